"""Run vLLM's DeepSeek-V4 on the ops.

    python examples/vllm_engine.py deepseek-ai/DeepSeek-V4-Flash

Where mhc-ops is installed beside vLLM, each process of vLLM calls ``install()`` by itself, through
an entry point; ``VLLM_PLUGINS`` says which plugins vLLM loads. A script that calls ``install()``
does so at the top level, because each process that vLLM spawns imports the script too.
"""

import sys

from mhc_ops.integrations import vllm as mhc_vllm

try:
    mhc_vllm.install()
except RuntimeError as error:
    print(f"this example needs vLLM {mhc_vllm.TESTED}: {error}")
    sys.exit(0)


def main(model: str) -> None:
    from vllm import LLM, SamplingParams

    engine = LLM(model=model)
    (answer,) = engine.generate(["Four streams flow"], SamplingParams(max_tokens=32, temperature=0))
    print(answer.outputs[0].text)


if __name__ == "__main__":
    for replaced in mhc_vllm.REPLACEMENTS:
        if not replaced.late:  # The engine imports the modules of its models later.
            bound = getattr(sys.modules[replaced.module], replaced.name)
            print(f"{replaced.module}.{replaced.name} runs the op: {bound is replaced.function}")
    for path in sys.argv[1:]:
        main(path)
