"""Apps that share the machine: manifests, keys, what each used, and what its budget leaves it.

`manifest` reads the TOML, `registry` keeps apps and the hashes of their keys, `usage` keeps what
they used, `meter` says what they may still do.  Who asks is the server's to find out.
"""
