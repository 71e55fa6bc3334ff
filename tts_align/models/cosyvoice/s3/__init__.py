# SPDX-License-Identifier: Apache-2.0
"""The S3 speech tokenizer, trainable."""
