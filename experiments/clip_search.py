"""What the rule for the scale costs: squared error over the power of the weights, per scale method.

Normal weights, and Student's t with 4 degrees of freedom, whose outliers are those of real layers.
Seconds on any machine:

    python experiments/clip_search.py

"""

import jax
import numpy as np

import qjax

SHAPE = (4096, 256)  # contracted axis first
SPECS = {
    **dict.fromkeys(("mxfp4", "mxfp6", "mxfp8"), ("mx_floor", "mx_even", "mx_ceil", "mse")),
    "nvfp4": ("nvfp4", "mse"),
    **dict.fromkeys(("int2_g64", "int3_g64", "int4_g64", "int8"), ("absmax", "mse")),
    **dict.fromkeys(("uint2_g64", "uint3_g64", "uint4_g64"), ("minmax", "mse")),
    **dict.fromkeys(("nf4_g64", "fp4_e2m1_g32", "fp6_e3m2_g32", "fp8_e4m3"), ("absmax", "mse")),
}


def error(w: np.ndarray, spec: qjax.Spec) -> float:
    """Relative squared error, in float64."""
    quantized = jax.jit(lambda w: qjax.dequantize(qjax.quantize(w, spec, 0)))(w)
    difference = np.asarray(quantized, np.float64) - w
    return float(np.mean(difference**2) / np.mean(w.astype(np.float64) ** 2))


def main() -> None:
    """Prints the table."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(SHAPE).astype(np.float32)
    heavy = rng.standard_t(4, SHAPE).astype(np.float32)
    print("| spec | method | normal | Student's t |\n| --- | --- | ---: | ---: |")
    for name, methods in SPECS.items():
        for method in methods:
            spec = qjax.Spec.parse(name)._replace(scale_method=method)
            errors = (f"{error(w, spec):.3e}" for w in (normal, heavy))
            print(f"| `{name}` | `{method}` | {' | '.join(errors)} |")


if __name__ == "__main__":
    main()
