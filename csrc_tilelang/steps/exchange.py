"""exchange: what the CTAs of a cluster tell each other of tokens that have an owner.

Token t of a cluster belongs to CTA t % 16, its owner. Every CTA sends the owner its sums of the
token; the owner adds up the 16 slices and sends the token's collapse weights to all; and where a
norm follows, every CTA sends all others its sum of the collapsed squares. These messages go through
distributed shared memory into inboxes, mbarriers that count bytes: one for the sums of each owned
token, one for the weights and one for the squares of every token.

A CTA waits only for CTAs of its own cluster, and the hardware starts the CTAs of a cluster together
or not at all, so they all run: no wait depends on another cluster, another kernel or the order in
which CTAs are scheduled. A CTA ends only when all that was sent to it has come, so nobody sends to
one that has gone.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from ..device import inbox_open, inbox_wait, send, send4
from ..layout import CLUSTER, HC_MULT, MMA_COLUMNS, SLICE_TREE, WARP, add_tree
from .project import SUMS, WARP_TREE, WARPS


def owned_tokens(tokens: int) -> int:
    """Return how many of a cluster's tokens a CTA owns at most."""
    return -(-tokens // CLUSTER)


def inboxes(tokens: int) -> int:
    """Return how many inboxes a CTA has: of sums, then of weights, then of squares."""
    return owned_tokens(tokens) + 2 * tokens


class Exchange(NamedTuple):
    """What a CTA is sent.

    Attributes:
        slices_shared: [owned tokens, 16, 32] fp32, the CTAs' sums.
        weights_shared: [tokens, 4] fp32, the collapse weights.
        squares_shared: [tokens, 16] fp32, the CTAs' squares of the collapsed streams.
        inbox_shared: the inboxes.
    """

    slices_shared: Any
    weights_shared: Any
    squares_shared: Any
    inbox_shared: Any

    def first_weights_inbox(self):
        """The inbox of the first token's weights, behind those of the sums."""
        return int(self.slices_shared.shape[0])

    def first_squares_inbox(self):
        """The inbox of the first token's squares, behind those of the weights."""
        return self.first_weights_inbox() + int(self.weights_shared.shape[0])

    def sums_inbox(self, i):
        """The inbox of the sums of owned token ``i``, of which this CTA is the owner."""
        return self.inbox_shared[i]

    def weights_inbox(self, token):
        """The inbox of a token's weights."""
        return self.inbox_shared[self.first_weights_inbox() + token]

    def squares_inbox(self, token):
        """The inbox of a token's squares."""
        return self.inbox_shared[self.first_squares_inbox() + token]


@T.macro
def open_inboxes(exchange, at):
    """All inboxes, opened by a lane of every warp: a cluster barrier must follow."""
    count = int(exchange.inbox_shared.shape[0])
    if at.lane == 0:
        for i in T.unroll(-(-count // WARPS)):
            if i * WARPS + at.warp < count:
                inbox_open(
                    exchange.inbox_shared[i * WARPS + at.warp],
                    T.if_then_else(
                        i * WARPS + at.warp < exchange.first_weights_inbox(),
                        CLUSTER * SUMS * 4,
                        T.if_then_else(
                            i * WARPS + at.warp < exchange.first_squares_inbox(),
                            HC_MULT * 4,
                            CLUSTER * 4,
                        ),
                    ),
                )


@T.macro
def send_sums(sums_shared, exchange, at):
    """The warps' sums of the tokens, added up, to the owners: a warp has a token, a lane a sum."""
    values_local = T.alloc_local((WARPS,), "float32")
    for i0_t in T.serial(T.ceildiv(at.count, WARPS)):
        token = i0_t * WARPS + at.warp
        if token < at.count and at.lane < SUMS:
            for w in T.unroll(WARPS):
                values_local[w] = sums_shared[token // MMA_COLUMNS, w, token % MMA_COLUMNS, at.lane]
            add_tree(values_local, WARP_TREE)
            send(
                exchange.slices_shared[token // CLUSTER, at.rank, at.lane],
                exchange.sums_inbox(token // CLUSTER),
                token % CLUSTER,
                values_local[0],
            )


@T.macro
def add_slices(i, column, exchange, total):
    """total[0] = sum ``column`` of owned token ``i``, when all slices have come."""
    values_local = T.alloc_local((CLUSTER,), "float32")
    inbox_wait(exchange.sums_inbox(i))
    for c in T.unroll(CLUSTER):
        values_local[c] = exchange.slices_shared[i, c, column]
    add_tree(values_local, SLICE_TREE)
    total[0] = values_local[0]


@T.macro
def send_weights(token, mix, first_lane, exchange, lane):
    """The collapse weights of a token to all; lane ``first_lane`` + j has that of stream j."""
    weights_local = T.alloc_local((HC_MULT,), "float32")
    for j in T.unroll(HC_MULT):
        weights_local[j] = T.shfl_sync(mix[0], (j + first_lane) % WARP)
    if lane < CLUSTER:
        send4(
            exchange.weights_shared[token, 0], exchange.weights_inbox(token), lane, weights_local[0]
        )


@T.macro
def wait_for_weights(token, exchange, weights_local):
    """The collapse weights of a token, when they have come."""
    inbox_wait(exchange.weights_inbox(token))
    for j in T.vectorized(HC_MULT):
        weights_local[j] = exchange.weights_shared[token, j]


@T.macro
def send_squares(token, squares, exchange, at):
    """The sum of the squares of this CTA's slice of a collapsed token, which a warp has, to all."""
    squares[0] = T.warp_reduce_sum(squares[0])
    if at.lane < CLUSTER:
        send(
            exchange.squares_shared[token, at.rank],
            exchange.squares_inbox(token),
            at.lane,
            squares[0],
        )


@T.macro
def add_squares(token, exchange, squares):
    """squares[0] = the sum of the squares of a collapsed token, when all slices have come."""
    values_local = T.alloc_local((CLUSTER,), "float32")
    inbox_wait(exchange.squares_inbox(token))
    for c in T.vectorized(CLUSTER):
        values_local[c] = exchange.squares_shared[token, c]
    add_tree(values_local, SLICE_TREE)
    squares[0] = values_local[0]
