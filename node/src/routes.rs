//! Which subnets of others a node takes, which it offers itself, and who is its exit.
//!
//! Decisions about one peer at a time, so that they cost no more than the map's changes do.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use tailnode_wire::tailcfg::Node;

/// What a node wants of the tailnet's routes. The default takes and offers none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Preferences {
    /// Take the subnets that peers route.
    pub accept: bool,
    /// Subnets to route for others.
    pub advertise: Vec<IpNet>,
    /// Be an exit for others.
    pub advertise_exit: bool,
    /// Whose exit to use.
    pub exit_node: Option<ExitNode>,
}

/// Names a peer that is to be the exit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitNode {
    /// By a tailnet address.
    Address(IpAddr),
    /// By its MagicDNS name, in lower case, or by the first label of it.
    Name(String),
}

impl std::fmt::Display for ExitNode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

/// A node's routes at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// What it offers to route and the control server lets it; `0.0.0.0/0` and `::/0`: it is an exit.
    pub routed: Vec<IpNet>,
    /// What it offers besides: nobody has approved it, another node has the turn, or the control
    /// server does not tell routers what they are, as Headscale until they connect again.
    pub unconfirmed: Vec<IpNet>,
    /// The exit that it is to use, as it was named; empty: none.
    pub exit_node: String,
    /// Whether that one takes its packets.
    pub exits: bool,
}

/// Both families' everything.
pub const EVERYWHERE: [IpNet; 2] = [
    IpNet::V4(Ipv4Net::new_assert(std::net::Ipv4Addr::UNSPECIFIED, 0)),
    IpNet::V6(Ipv6Net::new_assert(std::net::Ipv6Addr::UNSPECIFIED, 0)),
];

/// What an exit does not lead to: the tailnet itself, and the networks that are private to whoever
/// runs it (removeFromDefaultRoute in ipn/ipnlocal/local.go, and all unique local addresses, which
/// engines give to containers).
const NO_EXIT: [&str; 10] = [
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "224.0.0.0/4",
    "fc00::/7",
    "fe80::/10",
    "ff00::/8",
];

impl Preferences {
    /// What the control server is told that the node offers (Hostinfo.RoutableIPs).
    pub fn offered(&self) -> Vec<IpNet> {
        let exit = EVERYWHERE.iter().filter(|_| self.advertise_exit);
        self.advertise.iter().chain(exit).copied().collect()
    }

    /// What is behind the node itself, in the filter's eyes: its addresses, and what it offers.
    pub fn local(&self, myself: &Node) -> Vec<IpNet> {
        let mut local = [&*myself.addresses, &*self.advertise].concat();
        if self.advertise_exit {
            local.extend(beyond_exits());
        }
        local
    }

    /// What leads to a peer: its addresses; and subnets and everything where they are wanted.
    pub fn taken(&self, peer: &Node, myself: &Node) -> Vec<IpNet> {
        let is_exit = self.is_exit(peer, myself);
        let wanted = |net: &&IpNet| match net.prefix_len() {
            0 => is_exit,
            _ => self.accept || peer.addresses.contains(net),
        };
        peer.allowed_ips()
            .iter()
            .filter(wanted)
            .map(IpNet::trunc)
            .collect()
    }

    /// Whether this peer is the one that is named as the exit.
    fn is_exit(&self, peer: &Node, myself: &Node) -> bool {
        match &self.exit_node {
            None => false,
            Some(ExitNode::Address(address)) => {
                peer.addresses.iter().any(|own| own.addr() == *address)
            }
            Some(ExitNode::Name(wanted)) => {
                let name = peer.name.trim_end_matches('.').to_ascii_lowercase();
                // A short name is one of our own tailnet: peers of others are shared with us.
                let ours = myself.name.split_once('.').map_or("", |(_, domain)| domain);
                name == *wanted
                    || name.split_once('.').is_some_and(|(first, domain)| {
                        first == wanted && domain.eq_ignore_ascii_case(ours.trim_end_matches('.'))
                    })
            }
        }
    }

    /// How it stands with the routes, and what is wrong with the exit, if anything is.
    pub fn status<'a>(
        &self,
        myself: &Node,
        mut peers: impl Iterator<Item = &'a Node>,
    ) -> (Status, Option<String>) {
        let approved = |net: &IpNet| myself.allowed_ips().contains(net);
        let (routed, unconfirmed) = self.offered().into_iter().partition(approved);
        let mut status = Status {
            routed,
            unconfirmed,
            ..Status::default()
        };
        let Some(wanted) = &self.exit_node else {
            return (status, None);
        };
        status.exit_node = wanted.to_string();
        let trouble = match peers.find(|peer| self.is_exit(peer, myself)) {
            None => "is not in the tailnet, or policy hides it",
            Some(peer) if !peer.allowed_ips().iter().any(|net| net.prefix_len() == 0) => {
                "offers no exit, or nobody has approved it"
            }
            Some(peer) if peer.expired => "has an expired key",
            Some(peer) if peer.online == Some(false) => "is offline",
            Some(_) => {
                status.exits = true;
                return (status, None);
            }
        };
        let words = format!(
            "the exit node {wanted} {trouble}: until that changes, the container reaches nothing \
             outside the tailnet"
        );
        (status, Some(words))
    }
}

/// What an exit leads to.
pub fn beyond_exits() -> Vec<IpNet> {
    let private: Vec<IpNet> = NO_EXIT.iter().flat_map(|net| net.parse()).collect();
    let mut beyond = Vec::new();
    for everything in EVERYWHERE {
        add_all_but(everything, &private, &mut beyond);
    }
    beyond
}

/// Adds the parts of a network that are in none of the others.
fn add_all_but(net: IpNet, others: &[IpNet], to: &mut Vec<IpNet>) {
    if others.iter().any(|other| other.contains(&net)) {
        return;
    }
    let is_whole = !others.iter().any(|other| net.contains(other));
    match net.subnets(net.prefix_len() + 1) {
        Ok(halves) if !is_whole => halves.for_each(|half| add_all_but(half, others, to)),
        _ => to.push(net),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tailnode_wire::keys::NodePublicKey;

    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn node(name: &str, address: &str, allowed: &[&str]) -> Node {
        let mut node = Node::new(1, NodePublicKey::from_bytes([1; 32]));
        node.name = name.into();
        node.addresses = nets(&[address]);
        node.allowed_ips = Some([nets(&[address]), nets(allowed)].concat());
        node
    }

    fn exit(text: &str) -> Preferences {
        Preferences {
            exit_node: Some(match text.parse() {
                Ok(address) => ExitNode::Address(address),
                Err(_) => ExitNode::Name(text.into()),
            }),
            ..Preferences::default()
        }
    }

    const EXIT: [&str; 2] = ["0.0.0.0/0", "::/0"];

    #[test]
    fn subnets_are_taken_where_they_are_accepted_and_everything_from_the_exit() {
        let myself = node("web.t.example.", "100.64.0.1/32", &[]);
        let allowed = ["10.1.0.0/24", "10.2.0.7/32", "0.0.0.0/0", "::/0"];
        let peer = node("Gw.t.example.", "100.64.0.2/32", &allowed);
        let taken = |wishes: &Preferences| wishes.taken(&peer, &myself);
        assert_eq!(taken(&Preferences::default()), nets(&["100.64.0.2/32"]));
        let accept = Preferences {
            accept: true,
            ..Preferences::default()
        };
        assert_eq!(
            taken(&accept),
            nets(&["100.64.0.2/32", "10.1.0.0/24", "10.2.0.7/32"])
        );
        for named in ["gw", "gw.t.example", "100.64.0.2"] {
            let expected = [nets(&["100.64.0.2/32"]), EVERYWHERE.to_vec()].concat();
            assert_eq!(taken(&exit(named)), expected, "{named}");
        }
        for other in ["gw.example", "web", "100.64.0.1", ""] {
            assert_eq!(taken(&exit(other)), nets(&["100.64.0.2/32"]), "{other}");
        }
        let shared = node("gw.other.example.", "100.64.0.3/32", &EXIT);
        assert_eq!(exit("gw").taken(&shared, &myself).len(), 1);
    }

    #[test]
    fn an_exit_leads_to_the_internet_and_not_to_what_is_private() {
        let myself = node("web.t.example.", "100.64.0.1/32", &[]);
        let wishes = Preferences {
            advertise: nets(&["10.1.0.0/24"]),
            advertise_exit: true,
            ..Preferences::default()
        };
        assert_eq!(
            wishes.offered(),
            [nets(&["10.1.0.0/24"]), EVERYWHERE.to_vec()].concat()
        );
        let local = wishes.local(&myself);
        let leads = |ip: &str| {
            let ip: IpAddr = ip.parse().unwrap();
            local.iter().any(|net| net.contains(&ip))
        };
        for ip in [
            "100.64.0.1",
            "10.1.0.9",
            "192.0.2.1",
            "2001:db8::1",
            "255.255.255.255",
        ] {
            assert!(leads(ip), "{ip}");
        }
        for ip in [
            "100.64.0.2",
            "10.2.0.9",
            "172.17.0.1",
            "127.0.0.1",
            "fd00::1",
            "fe80::1",
        ] {
            assert!(!leads(ip), "{ip}");
        }
    }

    #[test]
    fn what_is_wrong_with_the_exit_is_said() {
        let myself = node("web.t.example.", "100.64.0.1/32", &["10.1.0.0/24"]);
        let (plain, mut gone) = (
            node("a.t.example.", "100.64.0.2/32", &[]),
            node("b.t.example.", "100.64.0.3/32", &EXIT),
        );
        gone.online = Some(false);
        let good = node("c.t.example.", "100.64.0.4/32", &EXIT);
        let peers = [plain, gone, good];
        for (name, words) in [
            ("a", Some("offers no exit")),
            ("b", Some("is offline")),
            ("c", None),
            ("d", Some("the exit node d is not in the tailnet")),
        ] {
            let (status, trouble) = exit(name).status(&myself, peers.iter());
            assert_eq!(
                (status.exit_node.as_str(), status.exits),
                (name, words.is_none())
            );
            let said = trouble.unwrap_or_default();
            assert!(said.contains(words.unwrap_or("")), "{said}");
            assert_eq!(said.is_empty(), words.is_none());
        }
        let offers = Preferences {
            advertise: nets(&["10.1.0.0/24", "10.2.0.0/24"]),
            ..Preferences::default()
        };
        let (status, _) = offers.status(&myself, peers.iter());
        assert_eq!(status.routed, nets(&["10.1.0.0/24"]));
        assert_eq!(status.unconfirmed, nets(&["10.2.0.0/24"]));
    }

    proptest! {
        #[test]
        fn all_but_some_is_what_it_says(bits: u32, nets in prop::collection::vec((any::<u32>(), 1u8..=32), 0..6)) {
            let others: Vec<IpNet> = nets
                .iter()
                .map(|(bits, length)| IpNet::new((*bits).to_be_bytes().into(), *length).unwrap().trunc())
                .collect();
            let mut rest = Vec::new();
            add_all_but(EVERYWHERE[0], &others, &mut rest);
            let ip = IpAddr::from(bits.to_be_bytes());
            let in_rest = rest.iter().filter(|net| net.contains(&ip)).count();
            let in_others = others.iter().any(|net| net.contains(&ip));
            prop_assert_eq!(in_rest, usize::from(!in_others));
        }
    }
}
