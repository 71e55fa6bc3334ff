# SPDX-License-Identifier: Apache-2.0
"""A test in stages: synthesise, transcribe, readings, similarity, quality, report; each resumes by itself."""
