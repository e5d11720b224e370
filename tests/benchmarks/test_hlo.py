"""What benchmarks/compile_gpu.py reads out of a compiler's texts, on texts written by hand. Needs no compiler."""

from __future__ import annotations

from benchmarks.hlo import Program, size_of, thunks
from benchmarks.sass import inner_loop

HLO = """HloModule jit_run, is_scheduled=true

%weights (p.0: bf16[3,8,16], p.1: s32[]) -> bf16[1,8,16] {
  %p.0 = bf16[3,8,16]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[1,8,16]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,8,16}
}

%async (a.0: bf16[3,8,16], a.1: s32[]) -> bf16[1,8,16] {
  %a.0 = bf16[3,8,16]{2,1,0} parameter(0)
  %a.1 = s32[] parameter(1)
  ROOT %copied = bf16[1,8,16]{2,1,0} fusion(%a.0, %a.1), kind=kCustom, calls=%weights
}

%product (x: f32[4,8], w: bf16[8,16]) -> f32[4,16] {
  %x = f32[4,8]{1,0} parameter(0)
  %w = bf16[8,16]{1,0} parameter(1)
  ROOT %dot = f32[4,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%biased (y: f32[4,16], b: f32[3,16], i: s32[]) -> (bf16[4,8], bf16[4,8]) {
  %y = f32[4,16]{1,0} parameter(0)
  %b = f32[3,16]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %none = s32[] constant(0)
  %one = f32[1,16]{1,0} dynamic-slice(%b, %i, %none), dynamic_slice_sizes={1,16}
  %wide = f32[4,16]{1,0} broadcast(%one), dimensions={0,1}
  %sum = bf16[4,16]{1,0} add(%y, %wide)
  %left = bf16[4,8]{1,0} slice(%sum), slice={[0:4], [0:8]}
  %right = bf16[4,8]{1,0} slice(%sum), slice={[0:4], [8:16]}
  ROOT %both = (bf16[4,8]{1,0}, bf16[4,8]{1,0}) tuple(%left, %right)
}

%update (whole: f32[64,8], part: f32[2,8], at: s32[]) -> f32[64,8] {
  %whole = f32[64,8]{1,0} parameter(0)
  %part = f32[2,8]{1,0} parameter(1)
  %at = s32[] parameter(2)
  ROOT %put = f32[64,8]{1,0} dynamic-update-slice(%whole, %part, %at, %at)
}

%tile (t: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %t = (s32[], f32[4,8]{1,0}) parameter(0)
  %inside = f32[4,8]{1,0} get-tuple-element(%t), index=1
  %next = s32[] get-tuple-element(%t), index=0
  %twice = f32[4,8]{1,0} add(%inside, %inside)
  ROOT %again = (s32[], f32[4,8]{1,0}) tuple(%next, %twice)
}

%more (m: (s32[], f32[4,8])) -> pred[] {
  %m = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%layer (c: (s32[], f32[4,8], bf16[3,8,16], f32[3,16], f32[64,8])) -> (s32[], f32[4,8]) {
  %c = (s32[], f32[4,8]{1,0}, bf16[3,8,16]{2,1,0}, /*index=3*/f32[3,16]{1,0}, f32[64,8]{1,0}) parameter(0)
  %start = ((bf16[3,8,16]{2,1,0}, s32[]), bf16[1,8,16]{2,1,0}, u32[]) async-start(%c#2, %c#0), calls=%async
  %done = bf16[1,8,16]{2,1,0} async-done(%start)
  %flat = bf16[8,16]{1,0} bitcast(%done)
  %gemm = f32[4,16]{1,0} fusion(%c#1, %flat), kind=kCustom, calls=%product
  %split = (bf16[4,8]{1,0}, bf16[4,8]{1,0}) fusion(%gemm, %c#3, %c#0), kind=kLoop, calls=%biased
  %first = bf16[4,8]{1,0} get-tuple-element(%split), index=0
  %drawn = bf16[4,8]{1,0} custom-call(%first, %split#1), custom_call_target="k", metadata={op_name="packed_attention/p"}
  %few = (f32[2,8]{1,0}, s8[4096]{0}) custom-call(%drawn), custom_call_target="__cublas$lt$matmul"
  %kept = f32[64,8]{1,0} fusion(%c#4, %few#0, %c#0), kind=kLoop, calls=%update
  %begin = (s32[], f32[4,8]{1,0}) tuple(%c#0, %c#1)
  %inner = (s32[], f32[4,8]{1,0}) while(%begin), condition=%more, body=%tile
  ROOT %end = (s32[], f32[4,8]{1,0}) tuple(%c#0, %inner#1)
}

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %carry = (s32[], f32[4,8]{1,0}) tuple(%p, %p)
  %loop = (s32[], f32[4,8]{1,0}) while(%carry), condition=%more, body=%layer, backend_config={TRIPS}
  ROOT %result = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
""".replace("TRIPS", '"known_trip_count":{"n":"3"}')

THUNKS = """000: kCommandBuffer [source]
    001: kCustomKernel [source] before grid
002: kWhile        [prev=000]
condition:
    003: kCustomKernel [source] compare grid
  body:
    004: kAsyncStart [source] stream
        006: kDynamicSliceFusion [source]
            005: kCopy [source] kCopy
    000: kCommandBuffer [source]
        007: kCustomKernel [source] gemm
    008: kCustomKernel [source] split
    009: kWhile        [prev=008]
condition:
        010: kCustomKernel [source] compare
      body:
        011: kCustomKernel [source] twice
012: kCustomKernel [prev=002] after
"""

SASS = """        /*0000*/ LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/ IADD3 R2, R2, 0x1, RZ ;
.L_x_2:
        /*0020*/ HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/ @P0 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0040*/ @!P1 BRA `(.L_x_2) ;
        /*0050*/ ISETP.NE.AND P1, PT, R2, R3, PT ;
        /*0060*/ @P1 BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/ BRA `(.L_x_3);
"""


class TestProgram:
    def test_bytes_of_a_layer(self) -> None:
        """By hand: (kind, bytes read, bytes written) of all that runs, in order."""
        program = Program(HLO)
        steps = [(step.name, step.kind, step.read, step.written) for step in program.steps(program.body)]
        assert steps == [
            ("start", "copy", 8 * 16 * 2 + 4, 8 * 16 * 2),
            ("gemm", "product", 4 * 8 * 4 + 8 * 16 * 2, 4 * 16 * 4),
            ("split", "elementwise", 4 * 16 * 4 + 16 * 4 + 4, 2 * 4 * 8 * 2),
            ("drawn", "attention", 2 * 4 * 8 * 2, 4 * 8 * 2),
            ("few", "product", 4 * 8 * 2, 2 * 8 * 4),
            ("kept", "copy", 2 * 8 * 4 + 4, 2 * 8 * 4),
            ("twice", "attention", 4 * 8 * 4, 4 * 8 * 4),
        ]

    def test_loops(self) -> None:
        program = Program(HLO)
        assert program.loop is not None
        assert (program.loop.name, program.loop.trips, program.body) == ("loop", 3, "layer")
        assert [one.trips for one in program.whiles(program.body)] == [None]

    def test_sizes(self) -> None:
        assert size_of("(bf16[4,8]{1,0}, pred[3]{0}, s32[])") == 64 + 3 + 4
        assert size_of("s8[16,16]{1,0}") == 256
        assert size_of("f8e4m3fn[10]{0}") == 10


class TestThunks:
    def test_of_the_loop(self) -> None:
        """The loop's own condition is not run where its length is known; an inner one's is."""
        found = [(one.number, one.kind, one.in_graph) for one in thunks(THUNKS, 2)]
        assert found == [
            (5, "kCopy", False),
            (7, "kCustomKernel", True),
            (8, "kCustomKernel", False),
            (10, "kCustomKernel", False),
            (11, "kCustomKernel", False),
        ]

    def test_of_all(self) -> None:
        assert [one.number for one in thunks(THUNKS, None)] == [1, 3, 5, 7, 8, 10, 11, 12]


def test_inner_loop() -> None:
    """The shorter of two loops around the same products, with its branch; not the last, which holds none."""
    assert inner_loop(SASS.splitlines()) == 3
    assert inner_loop(SASS.replace("HGMMA", "FFMA").splitlines()) == 0
