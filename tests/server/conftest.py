"""`pytest --hypothesis-profile=long`: see test_any_body.py."""

from hypothesis import settings

settings.register_profile("long", max_examples=3000)
