# SPDX-License-Identifier: MIT
"""A CUDA device without a card: within fake_cuda() tensors on "cuda" are PyTorch's fake tensors.

A fake tensor has a shape, a dtype and a device, but no values. Operands on two devices raise, as
on a card. A Watch sees each operator, and notes those for which the host would wait for the card.
"""

import contextlib
import sys
import traceback
from collections import Counter
from unittest import mock

import numpy as np
import torch
import torchaudio
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common

DEVICE = torch.device("cuda", 0)
SCRIPTS = {"common", "npair_tabular", "simclr_imix", "moco_imix", "byol_imix"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution"}
NO_KERNEL = {"empty", "empty_like", "_unsafe_view", "prim::device"}


def place():
    """Which function of the scripts, or backward() below, is running: "module.function"."""
    for frame, _ in traceback.walk_stack(sys._getframe()):
        module = frame.f_globals["__name__"]
        if frame.f_code.co_name.startswith("<"):  # a comprehension
            continue
        if module in SCRIPTS or frame.f_code is backward.__code__:
            return f"{module}.{frame.f_code.co_name}"


class Watch(TorchDispatchMode):
    """What operators did since clear().

    waits: list of (operator, place) that read a value or copied between host and card; products:
    set of (place, dtype) of the operands of matrix products and convolutions; launches: how often
    each operator ran on the card, a Counter.
    """

    def __init__(self):
        super().__init__()
        self.clear()

    def clear(self):
        self.waits, self.products, self.launches = [], set(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if name == "_local_scalar_dense":  # of item(), float(), bool()
            if args[0].is_cuda:
                self.waits.append(("read", place()))
            return 1
        if name == "_fused_sgd_":  # PyTorch has no fake version of this one, nor of the next
            assert all(t.is_cuda and t.dtype == torch.float32 for t in tensors)
            out = None
        elif name == "_sample_dirichlet":
            out = torch.empty_like(args[0])
        else:
            out = func(*args, **kwargs)

        tensors += [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        on_card = {t.is_cuda for t in tensors  # the host's single numbers go along with a launch
                   if t.is_cuda or t.dim() > 0 or "copy" in name}
        by_mask = "index_put" in name and any(t.dtype == torch.bool for t in tensors)
        if len(on_card) > 1 or (True in on_card and by_mask):  # a copy, or an index on the host
            self.waits.append((name, place()))
        if name in PRODUCTS:
            self.products.update((place(), t.dtype) for t in tensors)
        if True in on_card and not func.is_view and name not in NO_KERNEL:
            self.launches[name] += 1
        return out


def backward(loss):
    """loss.backward(): PyTorch's own asks for a card even where all tensors are fake."""
    grads = {loss.grad_fn: {0: torch.ones_like(loss)}}
    with torch.no_grad():
        while grads:
            node = max(grads, key=lambda node: node._sequence_nr())  # the one that was made last
            given = grads.pop(node)
            outs = node(*(given.get(i) for i in range(len(node._input_metadata))))
            outs = outs if isinstance(outs, tuple) else (outs,)
            for (earlier, i), grad in zip(node.next_functions, outs):
                if earlier is None or grad is None:
                    continue
                meta = earlier._input_metadata[i]
                grad = grad.sum_to_size(tuple(meta.shape)).to(meta.dtype)
                assert grad.device == meta.device
                if hasattr(earlier, "variable"):  # a weight
                    weight = earlier.variable
                    weight.grad = grad if weight.grad is None else weight.grad + grad
                else:
                    sums = grads.setdefault(earlier, {})
                    sums[i] = sums[i] + grad if i in sums else grad


@contextlib.contextmanager
def fake_cuda():
    """Within it "cuda" is a fake device; yields a Watch."""
    def mel_filters(bins, low, high, bands, *rest):  # torchaudio's needs values
        return torch.empty(bins, bands)

    def numpy(tensor):
        return np.zeros(tensor.shape, str(tensor.dtype).removeprefix("torch."))

    patch = mock.patch.object
    with (patch(torch.cuda, "is_bf16_supported", lambda **_: True),
          patch(torch.cuda, "mem_get_info", lambda device: (80e9, 80e9)),
          patch(torch.cuda, "get_rng_state", lambda device: None),
          patch(torch.cuda, "set_rng_state", lambda state, device: None),
          patch(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
          patch(torch.Tensor, "backward", backward),
          patch(torch.Tensor, "numpy", numpy),
          patch(nn.Module, "to", lambda module, **kwargs: module),  # can't swap fake weights
          patch(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, create=True),
          patch(torchaudio.functional, "melscale_fbanks", mel_filters),
          FakeTensorMode(allow_non_fake_inputs=True),  # those from NumPy
          Watch() as watch):
        try:
            yield watch
        finally:
            common.mel_filters.cache_clear()  # it keeps a fake tensor
