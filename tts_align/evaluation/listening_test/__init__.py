# SPDX-License-Identifier: Apache-2.0
"""Listening tests in one HTML file: made of recordings, answered in a browser, read back as tables and as labels."""
