"""Ring: how the weights come in, each warp for itself."""

# The decorator of inline code keeps the type of what it wraps, which takes one argument more.
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

from collections.abc import Sequence

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels.quantized_matmul import hopper_asm as ptx
from pallas_kernels.quantized_matmul.hopper_shape import Shape
from pallas_kernels.quantized_matmul.mosaic_gpu import Config


class Ring:
    """Each warp's own stages of weights, `[warp, step]`, and barriers that say they are full.

    `fetch` brings the tile number `tile` of the block, which lies at `row` of all weights, into its
    stage, or nothing if `row` is beyond them; of k, it begins at the tile `first`. Of a gate and
    what it multiplies rows are taken in turn.

    Args:
      shape, config: of the kernel.
      ends: where the rows of each weight end.
    """

    def __init__(self, shape: Shape, config: Config, ends: Sequence[int]) -> None:
        ref = plgpu.RefType()
        count = shape.words(config.depth)

        @plgpu.inline_mgpu(arg_types=(ref,))
        def open_(ctx, full):
            warp, lane = ptx.lane()
            live = arith.cmpi(arith.CmpIPredicate.ult, lane, ptx.number(config.steps))
            place = ptx.add_bytes(ptx.near(full), warp, config.steps * 8)
            ptx.run(
                "{ .reg .pred p; setp.ne.b32 p, $1, 0; @p mbarrier.init.shared::cta.b64 [$0], 1; "
                "fence.mbarrier_init.release.cluster; bar.warp.sync 0xFFFFFFFF; }",
                "r,r,~{memory}",
                ptx.add_bytes(place, lane, 8),
                ptx.flag(live),
            )

        @plgpu.inline_mgpu(
            arg_types=([[ref] * len(shape.pieces)] * len(ends), ref, ref, *[ptx.SCALAR] * 3)
        )
        def fetch(ctx, weights, w_s, full, tile, row, first):
            tile, row, first = (v.registers.item() for v in (tile, row, first))
            warp, lane = ptx.lane()
            place = arith.addi(
                arith.muli(warp, ptx.number(config.steps)),
                arith.remui(tile, ptx.number(config.steps)),
            )
            barrier = ptx.add_bytes(ptx.near(full), place, 8)
            to = ptx.add_bytes(ptx.near(w_s), place, count * 4)
            along = arith.addi(
                first, arith.muli(arith.andi(warp, ptx.number(3)), ptx.number(config.depth))
            )
            live = ptx.flag(arith.cmpi(arith.CmpIPredicate.eq, lane, ptx.number(0)))
            for i, held in enumerate(weights):
                here, own = in_turn(row, i) if shape.gate else side_by_side(row, i)
                branch = scf.IfOp(here)
                with ir.InsertionPoint(branch.then_block):
                    copy(held, own(), along, to, barrier, live)
                    scf.yield_([])

        def side_by_side(row, i):
            """Whether a row of all weights is of weight i, and which of its rows it is."""
            begin = ends[i - 1] if i else 0
            here = arith.cmpi(arith.CmpIPredicate.ult, row, ptx.number(ends[i]))
            if begin:
                after = arith.cmpi(arith.CmpIPredicate.uge, row, ptx.number(begin))
                here = arith.andi(after, here)
            return here, lambda: ptx.add(row, -begin)

        def in_turn(row, i):
            known = arith.cmpi(arith.CmpIPredicate.ult, row, ptx.number(ends[-1]))
            its = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(row, ptx.number(1)), ptx.number(i))
            return arith.andi(known, its), lambda: arith.shrui(row, ptx.number(1))

        def copy(held, row, along, to, barrier, live):
            """The pieces of a row of tiles, from the tile `along` k on."""
            i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
            ptx.run(
                "{ .reg .pred p; bar.warp.sync 0xFFFFFFFF; setp.ne.b32 p, $1, 0; "
                f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {count * 4}; }}",
                "r,r,~{memory}",
                barrier,
                live,
            )
            done = 0
            for w, piece in zip(held, shape.pieces, strict=True):
                size = piece.length(config.depth)
                tiles = shape.tiles_k if piece.per_tile else 1
                source = arith.extui(i64, arith.muli(row, ptx.number(tiles)))
                if piece.per_tile:
                    source = arith.addi(source, arith.extui(i64, along))
                words = arith.constant(i64, ir.IntegerAttr.get(i64, piece.words))
                ptx.run(
                    "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p cp.async.bulk.shared::cluster.global"
                    f".mbarrier::complete_tx::bytes [$0], [$1], {size * 4}, [$2]; }}",
                    "r,l,r,r,~{memory}",
                    ptx.add(to, done * 4),
                    ptx.at(w, arith.muli(source, words), i32),
                    barrier,
                    live,
                )
                done += size

        @plgpu.inline_mgpu(arg_types=(ref, ptx.SCALAR))
        def wait(ctx, full, phase):
            warp, _ = ptx.lane()
            ptx.run(
                "{ .reg .pred p; AGAIN_${:uid}: "
                "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @!p bra AGAIN_${:uid}; }",
                "r,r,~{memory}",
                ptx.add_bytes(ptx.near(full), warp, config.steps * 8),
                phase.registers.item(),
            )

        self.open, self.fetch, self.wait = open_, fetch, wait
