"""Large values that standbys leave in the store until somebody looks them up (the option `lazy`)."""
