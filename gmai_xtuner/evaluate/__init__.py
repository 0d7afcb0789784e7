# SPDX-License-Identifier: Apache-2.0

"""Questions of a benchmark -> answers of a model -> scores by a named protocol -> tables."""
