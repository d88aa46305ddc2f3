"""Every kernel once at small sizes, for compute-sanitizer; exits non-zero on a wrong result.

compute-sanitizer --tool memcheck  --error-exitcode 9 python benchmarks/sanitizer_workload.py
compute-sanitizer --tool racecheck --error-exitcode 9 python benchmarks/sanitizer_workload.py
"""

import torch

import mhc_ops
from mhc_ops import dispatch, support
from mhc_ops.testing import OUTPUTS, assert_matches_oracle, make_inputs

HIDDEN = 512


def main() -> None:
    mhc_ops.prewarm([HIDDEN])
    arch = support.arch(torch.device("cuda", 0))
    for start in dispatch.path_tokens(HIDDEN, arch, 2048):
        for op in OUTPUTS:
            for norm in (False,) if op == "post" else (False, True):
                inputs = make_inputs(op, start + 2, HIDDEN, norm=norm, device="cuda")
                with torch.no_grad():
                    result = getattr(torch.ops.mhc, op).default(**inputs)
                assert_matches_oracle(op, inputs, result)
                print(f"{op} norm={norm} tokens={start + 2}: right")


if __name__ == "__main__":
    main()
