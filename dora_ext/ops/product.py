"""The product for Hopper that linear layers run on: g * ([x | h] [W | B]^T) + bias in one kernel. Nothing public."""

from ._registry import fake


@fake("hopper_product")
def _(left, right, left_tail=None, right_tail=None, gain=None, bias=None, right_transposed=False):
    return left.new_empty(left.shape[0], right.shape[1 if right_transposed else 0])
