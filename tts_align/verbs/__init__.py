# SPDX-License-Identifier: Apache-2.0
"""What happens before and after training: sentences are spoken, judged and labelled."""
