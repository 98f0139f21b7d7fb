import itertools

from absl.testing import absltest

from paged_prefill.tests.covering import pairs


class PairsTest(absltest.TestCase):
    def test_every_value_stands_beside_each_of_every_other(self):
        values = dict(dtype=("int8", "float32"), scale=(None, 1, 2, 3), page=(8, 16, 64), layout="pks")
        found = pairs(**values)
        for (a, of_a), (b, of_b) in itertools.combinations(enumerate(values.values()), 2):
            self.assertEqual({(one[a], one[b]) for one in found}, {*itertools.product(of_a, of_b)})
        self.assertLess(len(found), 2 * 4 * 3)


if __name__ == "__main__":
    absltest.main()
