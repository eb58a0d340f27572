"""What mosquitto has to be told: who is let in, and who may read and write what.

The access rules are those at the top of `wire/topics.py`. `%u` is the common name in a peer's certificate,
so they are the same for every client and do not change when there is one more.

Next: mosquitto.conf(5); `lamina/identity/federation.py`, which writes this.
"""

from __future__ import annotations

from wire.topics import ROOT

AGGREGATOR = "aggregator"


def configuration(port: int) -> str:
    """`mosquitto.conf`, for mosquitto 2.0 and newer."""
    return f"""\
# Made by `lamina provision`. Paths start at the folder that mosquitto is started in: this one.
listener {port}

# TLS. Whoever has no certificate of this authority, or a revoked one, is not let in.
cafile ca.crt
certfile broker.crt
keyfile broker.key
crlfile crl.pem
require_certificate true

# The certificate's common name is the user, whatever a client calls itself, and also its one client id: by
# another's id, a client could end that one's connection.
use_identity_as_username true
use_username_as_clientid true
allow_anonymous false
acl_file acl

# Nothing to keep: all state is announced again every few seconds.
persistence false

# Transfers are in packets of 120 KiB. What does not fit into these queues is asked for again.
max_packet_size 1048576
max_inflight_messages 16
max_queued_messages 2000
"""


def access_rules() -> str:
    """The `acl_file`: what no line allows is denied."""
    return f"""\
# Made by `lamina provision`. %u is the common name in a client's certificate.
user {AGGREGATOR}
topic readwrite {ROOT}/#

# Everybody reads what is for everybody. (mosquitto warns that this line has no %u; it is meant so.)
pattern read {ROOT}/+/bcast/#
# A client reads what is for it, and writes under its own name.
pattern read {ROOT}/+/c/%u/down/#
pattern write {ROOT}/+/c/%u/up/#
"""
