"""What benchmarks/bundles.py counts of a program, written here as the TPU compiler writes them."""

from absl.testing import absltest, parameterized
import numpy as np

from paged_prefill.benchmarks import bundles

# Two numbers come from an operand into SMEM: a loop's trips, and whether what follows it is passed over.
PROGRAM = """
     0   :  { %s10_s0 = inlined_call_operand.vmem [shape: s32[2], index: 1, kind: input, shape index: {}] /* operand 1 */  ;;  %s11_s1 = smov [#allocation2] /* materialized constant */ }
   0x1   :  { %s12_s0 = sshll.u32 %s10_s0, 4  ;;  %s13_s0 = int_to_ptr.vmem [resolvable:$true] %s12_s0 }
   0x2   :  { %14 = dma.vmem_to_smem /*vmem=*/%s13_s0, /*size_in_granules=*/16, /*smem=*/%s11_s1, /*dst_syncflagno=*/[#allocation1] }
   0x3   :  { %s15_s2 = sld [smem:[#allocation2]]  ;;  %s16_s3 = smov 0 /* copy for cssa */ } /* Start region 1 :: End region 1 */
   0x4 LB: > { %s17_s3 = sadd.s32 1, %s18_s3  ;;  %19 = vst [vmem:[#allocation7_spill] sm:$0xff] /*vst_source=*/%v1_v1  ;;  %s18_s3 = sphi %s16_s3, %s17_s3 /* phi copy */ } /* Start region 2 */
   0x5   : > { %p20_p0 = scmp.ge.s32.totalorder %s17_s3, %s15_s2 } /* End region 2 */
   0x6   : > { %21 = sbr.rel (!%p20_p0) target = $region2 }
   0x7   :  {}
   0x8   :  {}
   0x9   :  {}
   0xa   :  { %s22_s4 = sld [smem:[#allocation2 + $0x1]] } /* Start region 5 */
   0xb   :  { %p23_p1 = scmp.ne.s32.totalorder %s22_s4, 0 }
   0xc   :  { %24 = sbr.rel (%p23_p1) target = $region4 }
   0xd   :  {}
   0xe   :  {}
   0xf   :  {}
  0x10   :  {}
  0x11   :  { %v25_v1 = vadd.f32 %v1_v1, %v1_v1 } /* Start region 3 :: End region 3 */
  0x12 PF:  { %s26_s5 = smov (%p23_p1, %s22_s4), 7  ;;  %p27_p2 = scmp.lt.s32.totalorder %v25_v1, 0 } /* Start/End empty region 4 */
"""


class BundlesTest(parameterized.TestCase):
    @parameterized.product(of=((1, 0), (5, 0), (5, -3)), delay=(4, None))
    def test_loops_and_branches_follow_the_operands(self, of, delay):
        trips, passed_over = of
        count = bundles.Program(PROGRAM.splitlines()).run({1: np.array([trips, passed_over], np.int32)}, delay)
        again = 7 if delay else 6  # without a number of its own, the delay ends where region 5 starts
        self.assertEqual(count.bundles, 4 + again * (trips - 1) + 7 + 6 + (passed_over == 0) + 1)
        self.assertEqual(count.spills, trips)

    def test_a_branch_on_what_is_not_known_is_an_error(self):
        with self.assertRaisesRegex(ValueError, "region 2 depends on %p20_p0, which is not known"):
            bundles.Program(PROGRAM.splitlines()).run({}, 4)

    def test_a_region_that_is_named_nowhere_is_behind_the_one_around_the_branch(self):
        program = """
     0   :  { %s1_s0 = smov 1 } /* Start region 1 :: Start region 2 */
   0x1   :  { %p2_p0 = scmp.ne.s32.totalorder %s1_s0, 0 }
   0x2   :  { %3 = sbr.rel (%p2_p0) target = $region3 }
   0x3   :  {}
   0x4   :  {}
   0x5   :  {}
   0x6   :  {} /* End region 2 */
   0x7   :  {} /* Start region 4 */
   0x8   :  {} /* End region 4 :: End region 1 */
   0x9   :  {}
"""
        self.assertEqual(bundles.Program(program.splitlines()).run({}, 4).bundles, 8)

    def test_the_delay_of_a_branch_ends_with_the_loop_around_it(self):
        program = """
     0   :  { %s1_s0 = smov 0 } /* Start region 1 */
   0x1 LB: > { %s3_s0 = sadd.s32 1, %s2_s0  ;;  %s2_s0 = sphi %s1_s0, %s3_s0 /* phi copy */ } /* Start region 2 */
   0x2   : > { %p4_p0 = scmp.ge.s32.totalorder %s3_s0, 3 }
   0x3   : > { %5 = sbr.rel (!%p4_p0) target = $region2 }
   0x4   : > {} /* End region 2 */
   0x5   :  {}
   0x6   :  {} /* End region 1 */
"""
        self.assertEqual(bundles.Program(program.splitlines()).run({}, None).bundles, 1 + 3 * 4 + 2)

    def test_a_pointer_is_no_instruction_and_writes_no_register(self):
        program = """
     0   :  { %s1_s0 = smov 0 }
   0x1 LB: > { %s3_s0 = sadd.s32 1, %s2_s0  ;;  %s2_s0 = sphi %s1_s0, %s3_s0 /* phi copy */ } /* Start region 1 */
   0x2   : > { %p4_p0 = scmp.ge.s32.totalorder %s3_s0, 3 }
   0x3   : > { %s5_s0 = sshll.u32 (%p4_p0), %s9_s1, 4  ;;  %s6_s0 = int_to_ptr.vmem [resolvable:$true] %s5_s0 }
   0x4   : > { %7 = sbr.rel (!%p4_p0) target = $region1 }
   0x5   : > {} /* End region 1 */
"""
        self.assertEqual(bundles.Program(program.splitlines()).run({}, None).bundles, 1 + 3 * 5)


if __name__ == "__main__":
    absltest.main()
