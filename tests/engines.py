"""Write stand-ins for SGLang and vLLM: the modules, names and signatures that adapters touch.

The signatures are those of SGLang 0.5.23 and vLLM 0.33.0; ``test_engines.py`` compares them with
the sources in the wheels. The functions answer with their name, so that a test sees which ran.
"""

from __future__ import annotations

from pathlib import Path

VERSIONS = {"sglang": "0.5.23", "vllm": "0.33.0"}

_POST = "x, residual, post_layer_mix, comb_res_mix"
_FIXED = (
    "fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, "
    "sinkhorn_repeat"
)
_SGLANG_NORM = "*, norm_weight=None, norm_eps=None"
_VLLM_NORM = "norm_weight=None, norm_eps=1e-06"

_MHC = "sglang/kernels/ops/layernorm/mhc.py"
_TILELANG = "vllm/model_executor/kernels/mhc/tilelang.py"

# The keys are engine, file and function; the values are parameters.
SIGNATURES = {
    "sglang": {
        _MHC: {
            "mhc_post": _POST,
            "mhc_pre": f"residual, {_FIXED}, n_splits=1, n_splits_pre=32, {_SGLANG_NORM}",
            "mhc_fused_post_pre": f"{_POST}, {_FIXED}, n_splits=1, tile_n=1, {_SGLANG_NORM}",
        },
        "sglang/kernels/ops/layernorm/mhc_head.py": {
            "fused_hc_head": "x, hc_fn, hc_scale, hc_base, norm_eps, hc_eps"
        },
    },
    "vllm": {
        _TILELANG: {
            "mhc_post_tilelang": _POST,
            "mhc_pre_tilelang": f"residual, {_FIXED}, n_splits=1, {_VLLM_NORM}",
            "mhc_fused_post_pre_tilelang": f"{_POST}, {_FIXED}, n_splits=1, tile_n=1, {_VLLM_NORM}",
            "mhc_pre_broadcast_tilelang": (
                f"residual, {_FIXED}, n_splits=1, {_VLLM_NORM}, fn_broadcast=None"
            ),
            "hc_head_fused_kernel_tilelang": "hs_flat, fn, hc_scale, hc_base, rms_eps, hc_eps",
        }
    },
}

# The engines' models define these functions, by class; "" is the module itself. The adapters wait
# for the functions.
LATE = {
    "sglang": {
        "sglang/srt/models/deepseek_v4.py": {
            "": {"hc_head_torch": "x, hc_fn, hc_scale, hc_base, *, norm_eps, hc_eps"},
            "DeepseekV4DecoderLayerBase": {
                "hc_pre": "self, x, hc_fn, hc_scale, hc_base, norm=None, forward_batch=None"
            },
        },
        "sglang/srt/models/deepseek_v4_mhc.py": {"": {"post": "cfg, x, residual, post_mix, comb"}},
        "sglang/srt/models/deepseek_v4_nextn.py": {
            "DeepseekV4ModelNextN": {"hc_head": "self, x, hc_fn, hc_scale, hc_base"}
        },
        "sglang/srt/models/glm5_next.py": {
            "Glm5NextDecoderLayer": {
                "hc_ffn_post_pre": (
                    "self, hidden_states, residual, h_res, h_post, out_norm_weight, out_norm_eps"
                )
            }
        },
    },
    "vllm": {
        "vllm/models/deepseek_v4/nvidia/model.py": {
            "DeepseekV4Model": {"finalize_mhc_broadcast_weights": "self"}
        }
    },
}

# The engines' models hold the functions by name, under another name, or looked up once.
_MODELS = {
    "sglang": {
        "sglang/srt/models/deepseek_v4.py": """
import functools


@functools.cache
def get_mhc_ops():
    from sglang.kernels.ops.layernorm.mhc import mhc_fused_post_pre

    return (mhc_fused_post_pre,)
""",
        "sglang/srt/models/by_name.py": """
from sglang.kernels.ops.layernorm.mhc import mhc_post as last_step
""",
        "sglang/__init__.py": """
class Engine:
    def __init__(self, model_path):
        self.model_path = model_path

    def generate(self, prompt, sampling_params):
        return {"text": f"{self.model_path}: {prompt}"}

    def shutdown(self):
        print("shut down")
""",
    },
    "vllm": {
        "vllm/platforms.py": """
class current_platform:
    dispatch_key = "CPU"
""",
        "vllm/models/by_name.py": """
from vllm.model_executor.kernels.mhc.tilelang import mhc_post_tilelang as last_step
""",
        "vllm/__init__.py": """
from types import SimpleNamespace


class SamplingParams:
    def __init__(self, max_tokens, temperature):
        pass


class LLM:
    def __init__(self, model):
        self.model = model

    def generate(self, prompts, sampling_params):
        texts = [f"{self.model}: {prompt}" for prompt in prompts]
        return [SimpleNamespace(outputs=[SimpleNamespace(text=text)]) for text in texts]
""",
    },
}


def write(engine: str, folder: Path, changes: dict[str, str | None] | None = None) -> None:
    """Write the stand-in of an engine.

    Args:
        engine: ``sglang`` or ``vllm``.
        folder: where its top-level package goes.
        changes: function to other parameters, or to None for a module without it.
    """
    files = dict(_MODELS[engine])
    for path, classes in LATE[engine].items():
        for owner, functions in classes.items():
            indent = "    " if owner else ""
            files[path] = files.get(path, "") + (f"\n\nclass {owner}:\n" if owner else "\n\n")
            for name, parameters in (functions | (changes or {})).items():
                if name in functions and parameters is not None:
                    files[path] += (
                        f"{indent}def {name}({parameters}):\n{indent}    return {name!r}\n"
                    )
            files[path] += f"{indent}kept = True\n"
    for path, functions in SIGNATURES[engine].items():
        files[path] = "".join(
            f"def {name}({parameters}):\n    return {name!r}\n\n\n"
            for name, parameters in (functions | (changes or {})).items()
            if name in functions and parameters is not None
        )
    for path, text in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
