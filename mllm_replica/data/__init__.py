"""From files and worlds to encoded samples, mixtures and packed rows."""
