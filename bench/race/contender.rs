use std::fmt;

use tailnode_tests::Release;

/// Who carries the traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Contender {
    /// Our node: the daemon beside the containers.
    Ours,
    /// Tailscale's own, as a sidecar: in the namespace of the app.
    Tailscaled(Release),
    /// The WireGuard that theirs is made of, alone: two keys and no tailnet.
    WireguardGo,
    /// What is left when a node owes nothing: see [`crate::floor`].
    Floor,
    /// No tunnel at all: the ceiling.
    Veth,
    /// The bridge that this engine puts containers on by itself.
    Bridge(&'static str),
    /// A bridge of this engine's whose containers know each other's names, as on a tailnet.
    NamedBridge(&'static str),
    /// Two such bridges: as many networks as Docker gives a container on a tailnet.
    TwoBridges(&'static str),
}

use Contender::{Bridge, Floor, NamedBridge, Ours, Tailscaled, TwoBridges, Veth, WireguardGo};

impl Contender {
    /// All that carry traffic from app to app.
    pub const ALL: [Contender; 6] = [
        Ours,
        Tailscaled(Release::Pinned),
        Tailscaled(Release::Newest),
        WireguardGo,
        Floor,
        Veth,
    ];

    /// Those of a quick run.
    pub const QUICK: [Contender; 2] = [Ours, Tailscaled(Release::Pinned)];

    /// Whether it is a node of a tailnet, with all that this means.
    pub fn is_node(self) -> bool {
        matches!(self, Ours | Tailscaled(_))
    }

    /// Whether it is an engine's own network, which is compared with by what ours takes more.
    pub fn is_bridge(self) -> bool {
        matches!(self, Bridge(_) | NamedBridge(_) | TwoBridges(_))
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tailscaled = |go_mod| format!("tailscaled {}", version_in(go_mod));
        f.pad(&match self {
            Ours => "tailnode".to_owned(),
            Tailscaled(Release::Pinned) => {
                tailscaled(include_str!("../../integration/peers/go.mod"))
            }
            Tailscaled(Release::Newest) => {
                tailscaled(include_str!("../../integration/peers/bench/go.mod"))
            }
            WireguardGo => "wireguard-go".to_owned(),
            Floor => "floor".to_owned(),
            Veth => "veth".to_owned(),
            Bridge(engine) => format!("{engine} bridge"),
            NamedBridge(engine) => format!("{engine} named bridge"),
            TwoBridges(engine) => format!("{engine} two bridges"),
        })
    }
}

fn version_in(go_mod: &str) -> &str {
    let mut words = go_mod.split_whitespace();
    words
        .find(|&word| word == "tailscale.com")
        .and_then(|_| words.next())
        .expect("go.mod names the version of tailscale.com")
}
