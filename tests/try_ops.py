"""Tries an installation: every op and its gradients, by its native kernel, against the reference."""

from functools import partial

import jax

from matrix import OPS, assert_close, native

for op, case in OPS.items():
    values = case.draw(4)
    got, want = (
        jax.jit(case.derivative_of(call))(*values)
        for call in (native(op), partial(case.call, implementation="reference"))
    )
    jax.tree.map(assert_close, got, want)
print(f"{len(OPS)} ops agree with the reference")
