"""Settings of the tests that draw their examples."""

from hypothesis import HealthCheck, settings

# on a machine with other things to do a slow example says nothing
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
