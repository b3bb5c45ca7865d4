"""What the type checkers must refuse: the lines marked so, and no others."""

import mlx.core as mx

from mlx_adadelta import AdaDelta, adadelta_update, backends, clip_scale

x = mx.zeros((3,))

AdaDelta()  # wrong: a learning rate is required
AdaDelta("1.0")  # wrong
AdaDelta(1.0, rho="0.9")  # wrong
AdaDelta(1.0, 0.9, 1e-6, 0.01)  # wrong: options go by name
AdaDelta(1.0, weight_decay=None)  # wrong
AdaDelta(1.0, decay_filter=lambda path: True)  # wrong: takes the parameter, too
AdaDelta(1.0, maximise=True)  # wrong: no such option
AdaDelta(1.0, state_dtype="float32")  # wrong
AdaDelta(1.0, backend="gpu")  # wrong: no such backend
AdaDelta(lambda step: "1.0")  # wrong
AdaDelta(1.0).update(x)  # wrong: the gradients are missing
AdaDelta(1.0).learning_rate = "1.0"  # wrong

adadelta_update(x, x, x, x)  # wrong: a learning rate is required
adadelta_update(x, [x], x, x, 1.0)  # wrong: an array beside a list
adadelta_update(x, x, x, x, 1.0, 0.9, 1e-6, 0.01)  # wrong: options go by name
adadelta_update(x, x, x, x, 1.0, stream="cpu")  # wrong
adadelta_update(x, x, x, x, 1.0, backend="CPU")  # wrong
w: mx.array = adadelta_update([x], [x], [x], [x], 1.0)[0]  # wrong: a list
ws: list[mx.array] = adadelta_update(x, x, x, x, 1.0)[0]  # wrong: an array

clip_scale([x], "1.0")  # wrong
scale: mx.array = clip_scale([x], 1.0)  # wrong: a tuple
backends("cpu")  # wrong
