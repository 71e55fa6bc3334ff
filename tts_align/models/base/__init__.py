# SPDX-License-Identifier: Apache-2.0
"""What the framework expects of models, whoever makes them."""
