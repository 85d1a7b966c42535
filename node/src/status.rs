//! What a node says of itself.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// A node at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The name it asked for.
    pub hostname: String,
    /// Its MagicDNS name without the trailing dot; empty until the first map.
    pub name: String,
    /// Its tailnet addresses; empty until the first map.
    pub addresses: Vec<IpAddr>,
    /// How it stands with the control server.
    pub login: Login,
    /// The control server's URL.
    pub login_server: String,
    /// Code of the DERP region where peers find it; empty while it has none.
    pub home_relay: String,
    /// What is wrong, in the control server's words or ours.
    pub health: Vec<String>,
    /// The routes that it offers, and its exit.
    pub routes: crate::routes::Status,
    /// Its peers, by name.
    pub peers: Vec<PeerStatus>,
    /// Bytes of IP packets received from peers since the node started.
    pub rx_bytes: u64,
    /// Bytes of IP packets sent to peers since the node started.
    pub tx_bytes: u64,
}

/// How a node stands with its control server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum Login {
    /// Registering, or waiting for the first map.
    Starting,
    /// A person must open the URL.
    NeedsLogin {
        /// The page to open.
        url: String,
        /// Why a node that had joined must join again; empty for one that never had.
        reason: String,
    },
    /// An administrator must approve the node.
    NeedsApproval,
    /// In the tailnet, with a live map.
    Running,
    /// Serving from the last map: the control server does not answer.
    Offline {
        /// Why.
        error: String,
    },
    /// The control server said no; trying again will not help.
    Refused {
        /// The control server's words and what to do.
        error: String,
    },
    /// The node key has expired; the node needs a new login.
    Expired,
    /// Logged out, or stopped. It joins anew when it is started again.
    Stopped,
}

/// A peer at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its MagicDNS name without the trailing dot.
    pub name: String,
    /// Its tailnet addresses.
    pub addresses: Vec<IpAddr>,
    /// Whether the control server sees it; `None`: not said.
    pub online: Option<bool>,
    /// The subnets that the node reaches through it; `0.0.0.0/0` and `::/0`: it is the exit.
    pub routes: Vec<IpNet>,
    /// How packets to it travel now.
    pub path: PeerPath,
    /// Bytes of IP packets received from it.
    pub rx_bytes: u64,
    /// Bytes of IP packets sent to it.
    pub tx_bytes: u64,
}

/// How packets to a peer travel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "via", rename_all = "kebab-case")]
pub enum PeerPath {
    /// Nothing was sent lately.
    Idle,
    /// Straight into its container, which the same daemon serves.
    Local,
    /// Straight by UDP.
    Direct {
        /// The peer's address.
        address: SocketAddr,
    },
    /// Through a relay.
    Relay {
        /// The region's code.
        region: String,
    },
}
