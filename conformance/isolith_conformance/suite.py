"""The whole suite for a vendor's repository: `from isolith_conformance.suite import *` in one test file.

Run it with `pytest -p isolith_conformance.plugin --backend NAME`.
"""

from isolith_conformance.test_accuracy import test_results_err_no_more_than_legal_roundings
from isolith_conformance.test_aliasing import (
    test_results_do_not_change_with_the_arguments,
    test_two_arguments_may_be_one_tensor,
)
from isolith_conformance.test_batch_invariance import test_rows_do_not_depend_on_their_batch
from isolith_conformance.test_claims import (
    test_a_call_is_claimed_and_runs_or_is_refused_with_a_reason,
    test_a_kernel_takes_some_call,
    test_an_operator_without_a_kernel_is_refused,
)
from isolith_conformance.test_determinism import test_runs_agree_to_the_bit
from isolith_conformance.test_errors import (
    test_an_illegal_call_is_refused_and_the_next_is_right,
    test_the_call_after_an_illegal_one_is_right,
)
from isolith_conformance.test_exact import test_exact_results_have_the_bits_of_the_reference
from isolith_conformance.test_executed import test_the_kernel_itself_does_the_work
from isolith_conformance.test_first_call import test_the_first_call_of_a_process_is_right
from isolith_conformance.test_fresh_values import test_values_that_change_in_place_change_the_results
from isolith_conformance.test_guard_zones import test_nothing_is_written_beside_the_tensors
from isolith_conformance.test_inputs_unchanged import test_arguments_keep_their_bytes
from isolith_conformance.test_large import test_rows_far_behind_in_memory_are_right
from isolith_conformance.test_layout import test_strides_and_offsets_do_not_matter
from isolith_conformance.test_mapping import test_invariants_hold
from isolith_conformance.test_nan_containment import test_a_nan_stays_in_its_row
from isolith_conformance.test_poison import test_results_do_not_depend_on_what_memory_held
from isolith_conformance.test_relations import test_relations_hold
from isolith_conformance.test_schedule import test_the_number_of_threads_does_not_matter
from isolith_conformance.test_selection import test_the_largest_values_are_selected
from isolith_conformance.test_streams import (
    test_a_call_waits_for_the_work_before_it_on_its_stream,
    test_calls_on_several_threads_do_not_disturb_each_other,
    test_nothing_changes_after_the_call_has_returned,
)
from isolith_conformance.test_unused_input import test_garbage_in_unused_input_has_no_effect

__all__ = [
    "test_a_call_is_claimed_and_runs_or_is_refused_with_a_reason",
    "test_a_call_waits_for_the_work_before_it_on_its_stream",
    "test_a_kernel_takes_some_call",
    "test_a_nan_stays_in_its_row",
    "test_an_illegal_call_is_refused_and_the_next_is_right",
    "test_an_operator_without_a_kernel_is_refused",
    "test_arguments_keep_their_bytes",
    "test_calls_on_several_threads_do_not_disturb_each_other",
    "test_exact_results_have_the_bits_of_the_reference",
    "test_garbage_in_unused_input_has_no_effect",
    "test_invariants_hold",
    "test_nothing_changes_after_the_call_has_returned",
    "test_nothing_is_written_beside_the_tensors",
    "test_relations_hold",
    "test_results_do_not_change_with_the_arguments",
    "test_results_do_not_depend_on_what_memory_held",
    "test_results_err_no_more_than_legal_roundings",
    "test_rows_do_not_depend_on_their_batch",
    "test_rows_far_behind_in_memory_are_right",
    "test_runs_agree_to_the_bit",
    "test_strides_and_offsets_do_not_matter",
    "test_the_call_after_an_illegal_one_is_right",
    "test_the_first_call_of_a_process_is_right",
    "test_the_kernel_itself_does_the_work",
    "test_the_largest_values_are_selected",
    "test_the_number_of_threads_does_not_matter",
    "test_two_arguments_may_be_one_tensor",
    "test_values_that_change_in_place_change_the_results",
]
