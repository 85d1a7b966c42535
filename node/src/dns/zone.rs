//! The names of one tailnet, and who knows the others.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use hickory_proto::rr::{
    Name, RData, RecordType,
    rdata::{A, AAAA, PTR},
};
use ipnet::IpNet;
use tailnode_wire::tailcfg::{self, DnsConfig, Node, NodeId};

use super::{SERVICE_V4, SERVICE_V6};

/// What the name of [`SERVICE_V4`] is when somebody asks (net/dns/resolver/tsdns.go).
const SERVICE_NAME: &str = "magicdns.localhost-tailscale-daemon";
/// A node with this attribute also has all names below its own (tailcfg/nodecap).
const SUBDOMAINS: &str = "dns-subdomain-resolve";
/// Reverse names of fd7a:115c:a1e0::/48.
const REVERSE_V6: &str = "0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa";
/// The second octets of 100.64.0.0/10, for its reverse names.
const REVERSE_V4: std::ops::RangeInclusive<u8> = 64..=127;
/// DNS's port.
const PORT: u16 = 53;

/// The names of one tailnet, shared by all who hold a clone.
#[derive(Clone, Debug, Default)]
pub struct Zone(Arc<RwLock<Names>>);

/// What a zone knows of a question.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// The records asked for.
    Records(Vec<RData>),
    /// The name exists, but has no such record.
    NoData {
        /// The zone that says so.
        zone: Name,
    },
    /// There is no such name.
    NxDomain {
        /// The zone that says so.
        zone: Name,
    },
    /// These servers know. If there are none, nobody may be asked.
    Forward(Vec<SocketAddr>),
    /// Not a name of this tailnet.
    NotMine,
}

/// How a server is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the host.
    Host(SocketAddr),
    /// Through the tailnet: it is a peer, or behind one.
    Peer {
        /// The server.
        server: SocketAddr,
        /// The node's own address.
        us: IpAddr,
    },
}

impl Answer {
    /// How much it settles; the least settles most.
    fn rank(&self) -> u8 {
        match self {
            Self::Records(_) | Self::NoData { .. } => 0,
            Self::NxDomain { .. } => 1,
            Self::Forward(_) => 2,
            Self::NotMine => 3,
        }
    }
}

impl Zone {
    /// Replaces everything by what the netmap says.
    pub fn set<'a>(&self, me: &Node, peers: impl IntoIterator<Item = &'a Node>, dns: &DnsConfig) {
        let mut names = self.write();
        let old = std::mem::take(&mut *names);
        *names = Names {
            unsupported: old.unsupported,
            routed: old.routed,
            ..Names::default()
        };
        names.me = me.addresses.iter().map(IpNet::addr).collect();
        if let Some((_, suffix)) = key(&me.name).split_once('.') {
            names.suffix = suffix.to_owned();
        }
        for node in peers {
            names.insert(node);
        }
        names.insert(me);
        names.configure(dns);
    }

    /// Takes a peer that came or changed, or forgets one that is gone.
    pub fn update(&self, id: NodeId, node: Option<&Node>) {
        let mut names = self.write();
        // Most changes are of a peer's whereabouts.
        if node.is_some_and(|node| names.has(node)) {
            return;
        }
        names.remove(id);
        if let Some(node) = node {
            names.insert(node);
        }
    }

    /// Looks a name up in several tailnets. What one of them knows counts more than that another
    /// has no such name, and that more than a server to ask; among equals the first counts.
    pub fn lookup<'a>(
        zones: impl IntoIterator<Item = &'a Zone>,
        name: &Name,
        kind: RecordType,
    ) -> Answer {
        let answers = zones.into_iter().map(|zone| zone.read().lookup(name, kind));
        answers.min_by_key(Answer::rank).unwrap_or(Answer::NotMine)
    }

    /// The tailnet's own servers for names that are not its own; empty: the host's.
    pub fn servers(&self) -> Vec<SocketAddr> {
        self.read().servers.clone()
    }

    /// Servers for where the host has none.
    pub fn fallback_servers(&self) -> Vec<SocketAddr> {
        self.read().fallback_servers.clone()
    }

    /// How a server is reached; `None` if it runs in this very container: what it asks for, it does
    /// not know itself.
    pub fn way(&self, server: SocketAddr) -> Option<Way> {
        let names = self.read();
        if names.me.contains(&server.ip()) {
            return None;
        }
        let routed = |net: &IpNet| net.contains(&server.ip());
        if !names.by_address.contains_key(&server.ip()) && !names.routed.iter().any(routed) {
            return Some(Way::Host(server));
        }
        let us = names.us(server.ip())?;
        Some(Way::Peer { server, us })
    }

    /// Names the networks that are reached through peers.
    pub fn set_routed(&self, networks: &[IpNet]) {
        self.write().routed = networks.into();
    }

    fn read(&self) -> RwLockReadGuard<'_, Names> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Names> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All names are in lower case and without the trailing dot.
#[derive(Debug, Default)]
struct Names {
    /// What MagicDNS names of the tailnet end with; empty while it is not known.
    suffix: String,
    /// The node's own addresses.
    me: Box<[IpAddr]>,
    /// Networks that are reached through peers.
    routed: Box<[IpNet]>,
    nodes: HashMap<NodeId, Host>,
    by_name: HashMap<Arc<str>, NodeId>,
    by_address: HashMap<IpAddr, NodeId>,
    extra: HashMap<String, Vec<IpAddr>>,
    /// Who answers for a suffix: the zone itself (`None`), or other servers.
    routes: HashMap<String, Option<Vec<SocketAddr>>>,
    servers: Vec<SocketAddr>,
    fallback_servers: Vec<SocketAddr>,
    /// Servers of kinds that are not spoken here, so that each is logged once.
    unsupported: HashSet<String>,
}

#[derive(Debug)]
struct Host {
    name: Arc<str>,
    addresses: Box<[IpAddr]>,
    /// It has all names below its own.
    subdomains: bool,
}

impl Names {
    /// Whether the node has the names that it had.
    fn has(&self, node: &Node) -> bool {
        let addresses = node.addresses.iter().map(IpNet::addr);
        self.nodes.get(&node.id).is_some_and(|host| {
            host.name.eq_ignore_ascii_case(bare(&node.name))
                && host.addresses.iter().copied().eq(addresses)
                && host.subdomains == node.cap_map.contains_key(SUBDOMAINS)
                && self.by_name.get(&host.name) == Some(&node.id)
        })
    }

    fn insert(&mut self, node: &Node) {
        if node.name.is_empty() {
            return;
        }
        let name: Arc<str> = key(&node.name).into();
        let addresses: Box<[IpAddr]> = node.addresses.iter().map(IpNet::addr).collect();
        self.by_name.insert(name.clone(), node.id);
        self.by_address
            .extend(addresses.iter().map(|address| (*address, node.id)));
        let subdomains = node.cap_map.contains_key(SUBDOMAINS);
        let host = Host {
            name,
            addresses,
            subdomains,
        };
        self.nodes.insert(node.id, host);
    }

    fn remove(&mut self, id: NodeId) {
        let Some(host) = self.nodes.remove(&id) else {
            return;
        };
        // A successor may have taken over the name or the address before this one left.
        if self.by_name.get(&host.name) == Some(&id) {
            self.by_name.remove(&host.name);
        }
        for address in &host.addresses {
            if self.by_address.get(address) == Some(&id) {
                self.by_address.remove(address);
            }
        }
    }

    fn configure(&mut self, dns: &DnsConfig) {
        for record in &dns.extra_records {
            if !matches!(&*record.r#type, "" | "A" | "AAAA") {
                tracing::debug!(
                    name = record.name,
                    kind = record.r#type,
                    "skipped a DNS record"
                );
                continue;
            }
            match record.value.parse() {
                Ok(address) => self
                    .extra
                    .entry(key(&record.name))
                    .or_default()
                    .push(address),
                Err(error) => {
                    tracing::warn!(name = record.name, value = record.value, %error, "skipped a DNS record");
                }
            }
        }
        if dns.proxied && !self.suffix.is_empty() {
            self.routes.insert(self.suffix.clone(), None);
            self.routes.insert(REVERSE_V6.into(), None);
            let reverse = REVERSE_V4.map(|octet| (format!("{octet}.100.in-addr.arpa"), None));
            self.routes.extend(reverse);
        }
        for (suffix, resolvers) in &dns.routes {
            let resolvers = resolvers.as_deref().unwrap_or_default();
            let servers = (!resolvers.is_empty()).then(|| self.plain_servers(resolvers));
            self.routes.insert(key(suffix), servers);
        }
        self.servers = self.plain_servers(&dns.resolvers);
        self.fallback_servers = self.plain_servers(&dns.fallback_resolvers);
    }

    /// The servers that speak plain DNS.
    fn plain_servers(&mut self, resolvers: &[tailcfg::Resolver]) -> Vec<SocketAddr> {
        let mut servers = Vec::new();
        for resolver in resolvers {
            let address = resolver.addr.as_str();
            let server = match (address.parse(), address.parse::<SocketAddr>()) {
                (Ok(ip), _) => SocketAddr::new(ip, PORT),
                (_, Ok(server)) => server,
                _ => {
                    if self.unsupported.insert(address.to_owned()) {
                        tracing::warn!(
                            server = address,
                            "the tailnet names a DNS server that is not asked: only plain DNS is supported yet"
                        );
                    }
                    continue;
                }
            };
            // That is us.
            if server.ip() != SERVICE_V4 && server.ip() != SERVICE_V6 {
                servers.push(server);
            }
        }
        servers
    }

    fn lookup(&self, name: &Name, kind: RecordType) -> Answer {
        let asked = key(&name.to_ascii());
        if let Some(host) = self.reverse(name) {
            return match Name::from_ascii(format!("{host}.")) {
                Ok(host) if matches!(kind, RecordType::PTR | RecordType::ANY) => {
                    Answer::Records(vec![RData::PTR(PTR(host))])
                }
                _ => Answer::NoData { zone: name.clone() },
            };
        }
        if let Some(addresses) = self.addresses(&asked) {
            let records: Vec<RData> = addresses
                .into_iter()
                .filter_map(|address| match (address, kind) {
                    (IpAddr::V4(ip), RecordType::A | RecordType::ANY) => Some(RData::A(A(ip))),
                    (IpAddr::V6(ip), RecordType::AAAA | RecordType::ANY) => {
                        Some(RData::AAAA(AAAA(ip)))
                    }
                    _ => None,
                })
                .collect();
            return if records.is_empty() {
                Answer::NoData { zone: name.clone() }
            } else {
                Answer::Records(records)
            };
        }
        // RFC 7686: nobody is to be asked for these.
        if asked.rsplit('.').next() == Some("onion") {
            return Answer::NxDomain {
                zone: name.base_name(),
            };
        }
        let mut zone = name.clone();
        for suffix in suffixes(&asked) {
            match self.routes.get(suffix) {
                Some(Some(servers)) => return Answer::Forward(servers.clone()),
                // That a zone's top does not exist would deny all names below it (RFC 8020).
                Some(None) if suffix.len() == asked.len() => return Answer::NoData { zone },
                Some(None) => return Answer::NxDomain { zone },
                None => zone = zone.base_name(),
            }
        }
        Answer::NotMine
    }

    /// The name of the host that a reverse name asks for.
    fn reverse(&self, name: &Name) -> Option<&str> {
        let net = name.parse_arpa_name().ok()?;
        if net.prefix_len() != net.max_prefix_len() {
            return None;
        }
        let address = net.addr();
        if address == SERVICE_V4 || address == SERVICE_V6 {
            return Some(SERVICE_NAME);
        }
        let id = self.by_address.get(&address)?;
        self.nodes.get(id).map(|host| &*host.name)
    }

    /// The node's own address of the same family.
    fn us(&self, other: IpAddr) -> Option<IpAddr> {
        let same = |us: &&IpAddr| us.is_ipv4() == other.is_ipv4();
        self.me.iter().find(same).copied()
    }

    /// The addresses of a known name, of the families that the node itself has.
    fn addresses(&self, name: &str) -> Option<Vec<IpAddr>> {
        if name == SERVICE_NAME {
            return Some(vec![SERVICE_V4, SERVICE_V6]);
        }
        let single_label = !name.contains('.') && !name.is_empty() && name != "localhost";
        if single_label && !self.suffix.is_empty() {
            return self.full_name(&format!("{name}.{}", self.suffix));
        }
        self.full_name(name)
    }

    fn full_name(&self, name: &str) -> Option<Vec<IpAddr>> {
        let host = |name| self.by_name.get(name).and_then(|id| self.nodes.get(id));
        let extra = self.extra.get(name);
        let host = match host(name) {
            None if extra.is_none() => Some(
                suffixes(name).find_map(|parent| host(parent).filter(|host| host.subdomains))?,
            ),
            found => found,
        };
        let of_host = host.map(|host| &host.addresses[..]).unwrap_or_default();
        // Addresses of a family that the node has not are of no use to it.
        let usable = |address: &&IpAddr| self.us(**address).is_some();
        let usable = of_host.iter().filter(usable);
        Some(extra.into_iter().flatten().chain(usable).copied().collect())
    }
}

/// A name as the maps here have it.
fn key(name: &str) -> String {
    bare(name).to_ascii_lowercase()
}

fn bare(name: &str) -> &str {
    name.trim_end_matches('.')
}

/// The name, its parent and so on, up to the root, which is empty.
fn suffixes(name: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(name), |name| match name.split_once('.') {
        Some((_, parent)) => Some(parent),
        None if name.is_empty() => None,
        None => Some(""),
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{collections::BTreeMap, net::Ipv4Addr, str::FromStr};

    use proptest::{collection::vec, prelude::*};
    use tailnode_wire::{keys::NodePublicKey, tailcfg::DnsRecord};

    use super::*;

    pub(crate) fn node(id: NodeId, name: &str, addresses: &[&str]) -> Node {
        let mut node = Node::new(id, NodePublicKey::from_bytes([id as u8; 32]));
        node.name = name.into();
        node.addresses = addresses
            .iter()
            .map(|a| IpNet::from(a.parse::<IpAddr>().unwrap()))
            .collect();
        node
    }

    pub(crate) fn servers(addresses: &[&str]) -> Vec<tailcfg::Resolver> {
        let resolver = |addr: &&str| tailcfg::Resolver {
            addr: addr.to_string(),
            ..Default::default()
        };
        addresses.iter().map(resolver).collect()
    }

    /// A tailnet with a self node, `web` and `db`, a record and split DNS.
    pub(crate) fn zone() -> Zone {
        let zone = Zone::default();
        let mut db = node(3, "db.tail1.ts.net.", &["100.64.0.3"]);
        db.cap_map.insert(SUBDOMAINS.into(), None);
        zone.set(
            &node(1, "me.tail1.ts.net.", &["100.64.0.1", "fd7a:115c:a1e0::1"]),
            &[
                node(2, "Web.tail1.ts.net.", &["100.64.0.2", "fd7a:115c:a1e0::2"]),
                db,
            ],
            &DnsConfig {
                proxied: true,
                extra_records: vec![DnsRecord {
                    name: "grafana.example.com".into(),
                    r#type: String::new(),
                    value: "100.64.0.2".into(),
                }],
                routes: BTreeMap::from([
                    (
                        "corp.example.com".into(),
                        Some(servers(&["10.0.0.53", "[fd00::53]:5353"])),
                    ),
                    (
                        "secret.corp.example.com.".into(),
                        Some(servers(&["https://dns.example"])),
                    ),
                    ("records.example.com".into(), None),
                ]),
                resolvers: servers(&["tls://9.9.9.9", "100.100.100.100", "9.9.9.9"]),
                ..DnsConfig::default()
            },
        );
        zone
    }

    fn name(text: &str) -> Name {
        Name::from_str(text).unwrap()
    }

    fn ask(zone: &Zone, text: &str, kind: RecordType) -> Answer {
        Zone::lookup([zone], &name(text), kind)
    }

    fn records(addresses: &[&str]) -> Answer {
        Answer::Records(
            addresses
                .iter()
                .map(|a| RData::from(a.parse::<IpAddr>().unwrap()))
                .collect(),
        )
    }

    fn no_data(zone: &str) -> Answer {
        Answer::NoData { zone: name(zone) }
    }

    #[test]
    fn names_of_the_tailnet() {
        use RecordType as T;
        let zone = zone();
        for asked in ["web.tail1.ts.net.", "WEB.Tail1.TS.net.", "web."] {
            assert_eq!(ask(&zone, asked, T::A), records(&["100.64.0.2"]), "{asked}");
            assert_eq!(ask(&zone, asked, T::AAAA), records(&["fd7a:115c:a1e0::2"]));
            assert_eq!(
                ask(&zone, asked, T::ANY),
                records(&["100.64.0.2", "fd7a:115c:a1e0::2"])
            );
            assert_eq!(ask(&zone, asked, T::MX), no_data(asked));
        }
        assert_eq!(ask(&zone, "me.", T::A), records(&["100.64.0.1"]));
        assert_eq!(
            ask(&zone, "db.tail1.ts.net.", T::AAAA),
            no_data("db.tail1.ts.net.")
        );
        assert_eq!(
            ask(&zone, "a.b.db.tail1.ts.net.", T::A),
            records(&["100.64.0.3"])
        );
        assert_eq!(
            ask(&zone, "a.web.tail1.ts.net.", T::A),
            Answer::NxDomain {
                zone: name("tail1.ts.net.")
            }
        );
        assert_eq!(
            ask(&zone, "tail1.ts.net.", T::SOA),
            no_data("tail1.ts.net.")
        );
        assert_eq!(ask(&zone, "nobody.", T::A), Answer::NotMine);
        assert_eq!(ask(&zone, "localhost.", T::A), Answer::NotMine);
        assert_eq!(ask(&zone, ".", T::NS), Answer::NotMine);
        assert_eq!(ask(&zone, "other.ts.net.", T::A), Answer::NotMine);
        assert_eq!(
            ask(&zone, "x.onion.", T::A),
            Answer::NxDomain {
                zone: name("onion.")
            }
        );
    }

    #[test]
    fn addresses_have_names() {
        use RecordType as T;
        let zone = zone();
        let pointer = |to: &str| Answer::Records(vec![RData::PTR(PTR(name(to)))]);
        let reverse = |ip: &str| Name::from(ip.parse::<IpAddr>().unwrap()).to_ascii();
        for ip in ["100.64.0.2", "fd7a:115c:a1e0::2"] {
            assert_eq!(
                ask(&zone, &reverse(ip), T::PTR),
                pointer("web.tail1.ts.net.")
            );
            assert_eq!(ask(&zone, &reverse(ip), T::A), no_data(&reverse(ip)));
        }
        assert_eq!(
            ask(&zone, &reverse("100.100.100.100"), T::PTR),
            pointer("magicdns.localhost-tailscale-daemon.")
        );
        assert_eq!(
            ask(&zone, &reverse("100.127.9.9"), T::PTR),
            Answer::NxDomain {
                zone: name("127.100.in-addr.arpa.")
            }
        );
        let ours = ask(&zone, &reverse("fd7a:115c:a1e0::9"), T::PTR);
        assert!(matches!(ours, Answer::NxDomain { .. }), "{ours:?}");
        assert_eq!(ask(&zone, &reverse("100.128.0.1"), T::PTR), Answer::NotMine);
        assert_eq!(ask(&zone, &reverse("8.8.8.8"), T::PTR), Answer::NotMine);
    }

    #[test]
    fn other_servers_and_records() {
        use RecordType as T;
        let zone = zone();
        let corp = ["10.0.0.53:53", "[fd00::53]:5353"].map(|s| s.parse().unwrap());
        assert_eq!(
            ask(&zone, "a.b.corp.example.com.", T::TXT),
            Answer::Forward(corp.to_vec())
        );
        assert_eq!(
            ask(&zone, "corp.example.com.", T::A),
            Answer::Forward(corp.to_vec())
        );
        assert_eq!(ask(&zone, "notcorp.example.com.", T::A), Answer::NotMine);
        // No server is left that could be asked, and others must not learn of the name.
        assert_eq!(
            ask(&zone, "x.secret.corp.example.com.", T::A),
            Answer::Forward(vec![])
        );
        assert_eq!(
            ask(&zone, "grafana.example.com.", T::A),
            records(&["100.64.0.2"])
        );
        assert_eq!(
            ask(&zone, "grafana.example.com.", T::AAAA),
            no_data("grafana.example.com.")
        );
        assert_eq!(
            ask(&zone, "x.records.example.com.", T::A),
            Answer::NxDomain {
                zone: name("records.example.com.")
            }
        );
        assert_eq!(zone.servers(), ["9.9.9.9:53".parse().unwrap()]);
    }

    #[test]
    fn servers_may_be_peers() {
        let zone = zone();
        let way = |server: &str| zone.way(server.parse().unwrap());
        let peer = |server: &str, us: &str| {
            let (server, us) = (server.parse().unwrap(), us.parse().unwrap());
            Some(Way::Peer { server, us })
        };
        assert_eq!(way("100.64.0.2:53"), peer("100.64.0.2:53", "100.64.0.1"));
        assert_eq!(
            way("[fd7a:115c:a1e0::2]:5353"),
            peer("[fd7a:115c:a1e0::2]:5353", "fd7a:115c:a1e0::1")
        );
        assert_eq!(
            way("9.9.9.9:53"),
            Some(Way::Host("9.9.9.9:53".parse().unwrap()))
        );
        assert_eq!(way("100.64.0.1:53"), None);
        zone.set_routed(&["9.9.9.0/24".parse().unwrap()]);
        assert_eq!(way("9.9.9.9:53"), peer("9.9.9.9:53", "100.64.0.1"));
    }

    #[test]
    fn peers_come_and_go() {
        use RecordType as T;
        let zone = zone();
        zone.update(4, Some(&node(4, "web.tail1.ts.net.", &["100.64.0.4"])));
        assert_eq!(ask(&zone, "web.", T::A), records(&["100.64.0.4"]));
        zone.update(2, None);
        assert_eq!(
            ask(&zone, "web.", T::A),
            records(&["100.64.0.4"]),
            "the successor stays"
        );
        let reverse = Name::from("100.64.0.2".parse::<IpAddr>().unwrap());
        assert!(matches!(
            Zone::lookup([&zone], &reverse, T::PTR),
            Answer::NxDomain { .. }
        ));
        zone.update(4, Some(&node(4, "web2.tail1.ts.net.", &["100.64.0.4"])));
        assert_eq!(ask(&zone, "web.", T::A), Answer::NotMine);
        assert_eq!(ask(&zone, "web2.", T::A), records(&["100.64.0.4"]));
        zone.update(9, None);
    }

    #[test]
    fn two_tailnets() {
        use RecordType as T;
        let (first, second) = (zone(), Zone::default());
        second.set(
            &node(1, "me.tail2.ts.net.", &["100.64.9.1"]),
            &[
                node(2, "web.tail2.ts.net.", &["100.64.9.2"]),
                node(3, "mail.tail2.ts.net.", &["100.64.9.3"]),
            ],
            &DnsConfig {
                proxied: true,
                ..DnsConfig::default()
            },
        );
        let ask = |text: &str, kind| Zone::lookup([&first, &second], &name(text), kind);
        assert_eq!(ask("web.", T::A), records(&["100.64.0.2"]));
        assert_eq!(ask("mail.", T::A), records(&["100.64.9.3"]));
        assert_eq!(ask("web.tail2.ts.net.", T::A), records(&["100.64.9.2"]));
        assert_eq!(
            ask("x.tail2.ts.net.", T::A),
            Answer::NxDomain {
                zone: name("tail2.ts.net.")
            }
        );
        // The first zone denies all of 100.64.0.0/10, the second knows better.
        let reverse = Name::from("100.64.9.3".parse::<IpAddr>().unwrap()).to_ascii();
        assert!(matches!(ask(&reverse, T::PTR), Answer::Records(_)));
        assert_eq!(ask("example.org.", T::A), Answer::NotMine);
    }

    #[test]
    fn without_magic_dns_unknown_names_are_not_denied() {
        let zone = Zone::default();
        let (me, peer) = (
            node(1, "me.t.net.", &["100.64.0.1"]),
            node(2, "p.t.net.", &["100.64.0.2"]),
        );
        zone.set(&me, [&peer], &DnsConfig::default());
        assert_eq!(
            ask(&zone, "p.t.net.", RecordType::A),
            records(&["100.64.0.2"])
        );
        assert_eq!(ask(&zone, "x.t.net.", RecordType::A), Answer::NotMine);
        assert_eq!(
            ask(&Zone::default(), "p.t.net.", RecordType::A),
            Answer::NotMine
        );
    }

    proptest! {
        #[test]
        fn every_node_is_found_and_nobody_else(
            labels in proptest::collection::btree_set("[a-z][a-z0-9-]{0,10}", 1..20),
            gone in vec(any::<prop::sample::Index>(), 0..5),
            other in "[a-z][a-z0-9-]{0,10}",
        ) {
            let labels: Vec<_> = labels.into_iter().collect();
            let address = |at: usize| Ipv4Addr::new(100, 64, 1, at as u8).to_string();
            let peers: Vec<_> = labels.iter().enumerate().map(|(at, label)| {
                node(at as NodeId, &format!("{label}.t.net."), &[&address(at)])
            }).collect();
            let zone = Zone::default();
            let dns = DnsConfig { proxied: true, ..DnsConfig::default() };
            zone.set(&node(99, "-me.t.net.", &["100.64.0.1"]), &peers, &dns);
            let gone: HashSet<usize> = gone.iter().map(|index| index.index(peers.len())).collect();
            for at in &gone {
                zone.update(*at as NodeId, None);
            }
            for (at, label) in labels.iter().enumerate() {
                let answer = ask(&zone, &format!("{label}.t.net."), RecordType::A);
                if gone.contains(&at) {
                    prop_assert_eq!(answer, Answer::NxDomain { zone: name("t.net.") });
                } else {
                    prop_assert_eq!(answer, records(&[&address(at)]));
                }
            }
            let known = labels.iter().position(|label| *label == other).is_some_and(|at| !gone.contains(&at));
            let answer = ask(&zone, &format!("{other}.t.net."), RecordType::A);
            prop_assert_eq!(known, matches!(answer, Answer::Records(_)));
        }

        #[test]
        fn no_name_panics(labels in vec(vec(any::<u8>(), 1..20), 0..8), kind in any::<u16>()) {
            if let Ok(name) = Name::from_labels(labels) {
                Zone::lookup([&zone()], &name, RecordType::from(kind));
            }
        }
    }
}
