"""Where and how a policy runs: devices, replicas, compiled and captured forwards, staging."""
