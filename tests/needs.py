"""What some tests need that is not always there. Holds no test."""

import pytest

from jaxdecode.aot import compiler_installed

needs_compiler = pytest.mark.skipif(not compiler_installed(), reason='needs pip install "jaxdecode[check]"')
