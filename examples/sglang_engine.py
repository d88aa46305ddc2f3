"""Run SGLang's DeepSeek-V4 on the ops.

    SGLANG_OPT_FUSE_MHC_POST_PRE=1 python examples/sglang_engine.py deepseek-ai/DeepSeek-V4-Flash

``install()`` stands at the top level, because each process that SGLang spawns to run the model
imports this file. The variable is SGLang's own, and makes SGLang run boundaries fused.
"""

import sys

from mhc_ops.integrations import sglang as mhc_sglang

try:
    mhc_sglang.install()
except RuntimeError as error:
    print(f"this example needs SGLang {mhc_sglang.TESTED}: {error}")
    sys.exit(0)


def main(model_path: str) -> None:
    import sglang

    engine = sglang.Engine(model_path=model_path)
    try:
        answer = engine.generate("Four streams flow", {"max_new_tokens": 32, "temperature": 0})
        print(answer["text"])
    finally:
        engine.shutdown()


if __name__ == "__main__":
    for replaced in mhc_sglang.REPLACEMENTS:
        if not replaced.late:  # The engine imports the modules of its models later.
            bound = getattr(sys.modules[replaced.module], replaced.name)
            print(f"{replaced.module}.{replaced.name} runs the op: {bound is replaced.function}")
    for path in sys.argv[1:]:
        main(path)
