"""Work in several processes gives what it gives in one, in the same order."""

import pytest

from memspan.base import BadInput, refuse
from memspan.base.parallel import spread


def test_answers_keep_the_order_of_the_items_and_joblibs_backends_apply():
    joblib = pytest.importorskip("joblib")
    with joblib.parallel_config(backend="threading"):
        assert spread(lambda n: n * n, range(20), jobs=3) == [n * n for n in range(20)]


def test_a_refusal_of_the_work_arrives_as_it_was():
    joblib = pytest.importorskip("joblib")

    def work(n):
        refuse("n", n, "give another")

    for jobs in (1, 2):
        with joblib.parallel_config(backend="threading"), pytest.raises(BadInput, match="n=7: give another"):
            spread(work, [7], jobs=jobs)


@pytest.mark.parametrize("jobs", [0, True, 1.5, "all"])
def test_what_is_no_number_of_processes_is_refused(jobs):
    with pytest.raises(BadInput, match="jobs="):
        spread(len, ["a"], jobs=jobs)
