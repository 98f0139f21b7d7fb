"""What benchmarks/bundles.py counts of a program, written here as the TPU compiler writes them."""

import pathlib
import tempfile

from absl.testing import absltest, parameterized
import numpy as np

from paged_prefill.benchmarks import bundles, tpu_schedule

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

    @parameterized.parameters("hbm", "vmem")
    def test_operands_that_are_counted_in_rows(self, memory):
        program = PROGRAM.replace("operand.vmem", f"operand.{memory}").replace("int_to_ptr.vmem", f"int_to_ptr.{memory}")
        program = program.replace("dma.vmem_to_smem", f"dma.{memory}_to_smem")
        self.assertEqual(bundles.Program(program.splitlines()).run({1: np.array([2, 1], np.int32)}, 4).bundles, 4 + 7 + 7 + 7)

    def test_a_branch_on_what_is_not_known_is_an_error(self):
        with self.assertRaisesRegex(ValueError, "region 2 depends on %p20_p0, which is not known"):
            bundles.Program(PROGRAM.splitlines()).run({}, 4)

    @parameterized.parameters(0.5, -0.5)
    def test_what_is_made_of_a_vector_counts_as_0(self, threshold):
        program = f"""
     0   :  {{ %1 = vpush %v0_v0  ;;  %s2_s0 = spop %1 }}
   0x1   :  {{ %p3_p0 = scmp.gt.f32.partialorder %s2_s0, {threshold} }}
   0x2   :  {{ %4 = sbr.rel (!%p3_p0) target = $region1 }}
   0x3   :  {{}}
   0x4   :  {{}}
   0x5   :  {{}}
   0x6   :  {{}}
   0x7   :  {{ %v5_v1 = vadd.f32 %v0_v0, %v0_v0 }}
   0x8   :  {{}} /* Start region 1 */
"""
        count = bundles.Program(program.splitlines()).run({}, 4)
        self.assertEqual(count.bundles, 8 + (threshold < 0))

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

    def test_a_scalar_that_was_spilled_to_hbm_comes_back(self):
        program = """
     0   :  { %s1_s0 = smov 1  ;;  %s2_s1 = smov [#allocation3_spill]  ;;  %s3_s2 = smov [#allocation4_spill] }
   0x1   :  { %4 = sst [smem:[#allocation4_spill]] %s1_s0 }
   0x2   :  { %5 = dma.smem_to_hbm /*smem=*/%s3_s2, /*size_in_granules=*/1, /*hbm=*/%s2_s1, /*dst_syncflagno=*/[#allocation7] }
   0x3   :  { %s6_s0 = smov [#allocation5_spill] }
   0x4   :  { %7 = dma.hbm_to_smem /*hbm=*/%s2_s1, /*size_in_granules=*/1, /*smem=*/%s6_s0, /*dst_syncflagno=*/[#allocation7] }
   0x5   :  { %s8_s3 = sld [smem:[%s6_s0]] }
   0x6   :  { %p9_p0 = scmp.ne.s32.totalorder %s8_s3, 1 }
   0x7   :  { %10 = sbr.rel (!%p9_p0) target = $region1 }
   0x8   :  {}
   0x9   :  {}
   0xa   :  {}
   0xb   :  {}
   0xc   :  {}
   0xd   :  {} /* Start region 1 */
"""
        self.assertEqual(bundles.Program(program.splitlines()).run({}, 4).bundles, 13)

    @parameterized.parameters((3 * 7 + 5, 7), (2**32 - 1, 3), (4, 9))
    def test_quotients_and_remainders(self, x, y):
        program = f"""
     0   :  {{ %s1_s0 = smov {x}  ;;  %s2_s1 = smov {2**32 // y + 1} }}
   0x1   :  {{ %3 = sdivrem.u32 %s1_s0, {y} /* kRem */  ;;  %4 = sdivrem.u32 %s1_s0, {y} /* kDiv */ }}
   0x2   :  {{ %s5_s2 = spop.drf %3  ;;  %s6_s3 = smulhi.u32 %s1_s0, %s2_s1 }}
   0x3   :  {{ %s7_s4 = spop.drf %4 }}
   0x4   :  {{ %p8_p0 = scmp.ne.s32.totalorder %s5_s2, {x % y}  ;;  %p9_p1 = scmp.ne.s32.totalorder %s6_s3, {x // y} }}
   0x5   :  {{ %p10_p2 = por %p8_p0, %p9_p1  ;;  %p11_p3 = scmp.ne.s32.totalorder %s7_s4, {x // y} }}
   0x6   :  {{ %p12_p4 = por %p10_p2, %p11_p3 }}
   0x7   :  {{ %13 = sbr.rel (%p12_p4) target = $region1 }}
   0x8   :  {{}}
   0x9   :  {{}}
   0xa   :  {{}}
   0xb   :  {{}}
   0xc   :  {{}}
   0xd   :  {{}} /* Start region 1 */
"""
        self.assertEqual(bundles.Program(program.splitlines()).run({}, 4).bundles, 14)

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


class RunsTest(parameterized.TestCase):
    """What benchmarks/tpu_schedule.py takes from a call."""

    @parameterized.named_parameters(
        ("a_branch_that_was_not_taken", ["a", "b"], [[], [1]], [("b", 1)]),
        ("a_loop", ["a"], [[1, 2]], [("a", 1), ("a", 2)]),
        ("a_function_traced_once_and_called_twice", ["a", "b"], [[1, 2]], [("a", 1), ("b", 2)]),
    )
    def test_runs_of_programs_and_their_files(self, paths, calls, runs):
        self.assertEqual(tpu_schedule.runs_of_files("name", paths, calls), runs)

    def test_files_of_a_program_are_not_those_of_another_that_begins_like_it(self):
        there = ("7-plan.10-01-final", "3-plan.2-01-final", "3-plan.2-00-schedule-analysis_final", "4-plan_all.1-01-final")
        with tempfile.TemporaryDirectory() as dump:
            for file in there:
                pathlib.Path(dump, f"{file}_bundles.txt").touch()
            files = [pathlib.Path(x).name for x in tpu_schedule.files_of("plan", dump)]
        self.assertEqual(files, ["3-plan.2-01-final_bundles.txt", "7-plan.10-01-final_bundles.txt"])

    def test_files_that_fit_no_runs_are_an_error(self):
        with self.assertRaisesRegex(ValueError, "name runs 3 times, and its final bundles are in 2 files"):
            tpu_schedule.runs_of_files("name", ["a", "b"], [[1, 2, 3]])


if __name__ == "__main__":
    absltest.main()
