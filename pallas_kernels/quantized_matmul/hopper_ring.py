"""Ring: how the weights come in, each warp for itself."""

# The decorator of inline code keeps the type of what it wraps, which takes one argument more.
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.quantized_matmul import hopper_asm as ptx
from pallas_kernels.quantized_matmul.hopper_shape import Shape
from pallas_kernels.quantized_matmul.mosaic_gpu import Config


class Ring:
    """Each warp's own stages of weights, `[warp, step]`, and barriers that say they are full."""

    def __init__(self, shape: Shape, config: Config) -> None:
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

        @plgpu.inline_mgpu(arg_types=([ref] * len(shape.pieces), ref, ref))
        def fetch(ctx, weights, w_s, full):
            i64 = ir.IntegerType.get_signless(64)
            warp, lane = ptx.lane()
            barrier = ptx.add_bytes(ptx.near(full), warp, config.steps * 8)
            to = ptx.add_bytes(ptx.near(w_s), warp, config.steps * count * 4)
            part = arith.andi(warp, ptx.number(3))
            live = ptx.flag(arith.cmpi(arith.CmpIPredicate.eq, lane, ptx.number(0)))
            ptx.run(
                "{ .reg .pred p; bar.warp.sync 0xFFFFFFFF; setp.ne.b32 p, $1, 0; "
                f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {count * 4}; }}",
                "r,r,~{memory}",
                barrier,
                live,
            )
            done = 0
            for w, piece in zip(weights, shape.pieces, strict=True):
                size = piece.length(config.depth)
                source = arith.muli(part, ptx.number(size)) if piece.per_tile else ptx.number(0)
                source = arith.extui(i64, source)
                ptx.run(
                    "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p cp.async.bulk.shared::cluster.global"
                    f".mbarrier::complete_tx::bytes [$0], [$1], {size * 4}, [$2]; }}",
                    "r,l,r,r,~{memory}",
                    ptx.add(to, done * 4),
                    ptx.at(w, source, ir.IntegerType.get_signless(32)),
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
