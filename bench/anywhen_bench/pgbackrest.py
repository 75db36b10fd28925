"""What every measurement says to pgBackRest alike."""


def stanza(server):
    """How its configuration names a server that runs here."""
    return f"""
[main]
pg1-path={server.data}
pg1-socket-path={server.folder}
pg1-port={server.port}
pg1-user=postgres
"""
