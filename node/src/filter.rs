//! Which packets may enter the container, and which of its own may leave.
//!
//! Rules decide for what others begin, packet by packet: a rule taken away stops even flows that
//! are running. Answers to what the container began pass by state, under whatever rules. Matching
//! follows wgengine/filter/{filter,match,tailcfg}.go; where that lets in every TCP packet without
//! SYN and every ICMP error, this asks for a flow that they belong to.

use std::{
    collections::HashMap,
    hash::Hash,
    net::IpAddr,
    str::FromStr,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use tailnode_wire::tailcfg::{FilterRule, PortRange};

use crate::packet::{Icmp, Packet, Transport, protocol, tcp_flags};

/// How long an idle TCP connection is remembered, at least; at most twice that.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(3600);
/// The same for everything short-lived: UDP, pings, connections that open or close.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(60);
/// Flows in each of a table's two generations. Full tables forget what was idle longest.
const GENERATION: usize = 4096;
/// After the first packet, how long TCP connections that the container already has are taken as
/// begun by it. Connections outlive a restart of the daemon; its memory of them does not.
const ADOPTION: Duration = Duration::from_secs(120);
/// After so many changes of the rules in that time, no more connections are taken so.
const FORMER: usize = 16;

/// The judgement on a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Let it through.
    Accept,
    /// Throw it away.
    Drop(Reason),
}

/// Why a packet was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Reason {
    /// Inbound, but not to the node's addresses or a subnet that it routes.
    #[error("not for this node")]
    ForeignDestination,
    /// Outbound, but not from the node's addresses or a subnet that it routes.
    #[error("not from this node's addresses")]
    ForeignSource,
    /// Outbound to a multicast group or to everyone; a tailnet carries neither.
    #[error("multicast does not cross a tailnet")]
    Multicast,
    /// No rule lets it in.
    #[error("no access rule lets it in")]
    NoRule,
    /// An answer to something that the container did not ask.
    #[error("answers nothing that the container sent")]
    NoFlow,
    /// The node refuses everything that it did not ask for.
    #[error("shields are up")]
    ShieldsUp,
}

/// The stateful packet filter of one node. The default lets nothing in, and out neither.
#[derive(Debug)]
pub struct Filter {
    rules: Rules,
    /// Rules that were in force before: what they let in, the container did not begin. Kept while
    /// connections are adopted.
    former: Vec<Rules>,
    local: Addresses,
    shields_up: bool,
    /// When the first packet came.
    since: Option<Instant>,
    /// TCP connections that the container opened.
    connections: Flows<()>,
    /// What else the container began, and its connections that open or close.
    exchanges: Flows<Phase>,
    /// Flows without connections that others began: the container's part in them are answers.
    served: Flows<()>,
}

impl Default for Filter {
    fn default() -> Self {
        Self {
            rules: Rules::default(),
            former: Vec::new(),
            local: Addresses::default(),
            shields_up: false,
            since: None,
            connections: Flows::new(CONNECTION_TIMEOUT),
            exchanges: Flows::new(EXCHANGE_TIMEOUT),
            served: Flows::new(EXCHANGE_TIMEOUT),
        }
    }
}

impl Filter {
    /// Replaces all rules. Flows that the container began go on.
    ///
    /// `with_capability` names the addresses of the nodes that have a capability, for sources
    /// such as `cap:name`; call this again when they change. What cannot be read of a rule is
    /// logged and left out, so that the rule lets in less.
    pub fn set_rules<'a>(
        &mut self,
        rules: impl IntoIterator<Item = &'a FilterRule>,
        with_capability: impl Fn(&str) -> Vec<IpAddr>,
    ) {
        let mut new = Rules::default();
        for rule in rules {
            let protocols = Protocols::new(&rule.ip_proto);
            let mut sources = AddressesBuilder::default();
            for source in &rule.src_ips {
                match source.strip_prefix("cap:") {
                    Some(capability) => {
                        for address in with_capability(capability) {
                            sources.add(address, address);
                        }
                    }
                    None => sources.parse(source),
                }
            }
            let sources = sources.build();
            let (mut destinations4, mut destinations6) = (Vec::new(), Vec::new());
            for destination in &rule.dst_ports {
                let mut addresses = AddressesBuilder::default();
                addresses.parse(&destination.ip);
                let ports = destination.ports;
                destinations4.extend(addresses.v4.into_iter().map(|span| (span, ports)));
                destinations6.extend(addresses.v6.into_iter().map(|span| (span, ports)));
            }
            new.v4
                .extend(Rule::new(protocols, sources.v4, destinations4));
            new.v6
                .extend(Rule::new(protocols, sources.v6, destinations6));
        }
        if new != self.rules {
            let before = std::mem::replace(&mut self.rules, new);
            if self.former.len() < FORMER {
                self.former.push(before);
            }
        }
    }

    /// Says what is local: the node's addresses and the subnets that it routes for others.
    pub fn set_local(&mut self, networks: &[IpNet]) {
        let mut local = AddressesBuilder::default();
        for network in networks {
            local.add(network.network(), network.broadcast());
        }
        self.local = local.build();
    }

    /// With shields up, rules let nothing in; answers to the container still come through. They
    /// are up while a packet of a peer is judged that may answer but not begin.
    pub fn set_shields_up(&mut self, up: bool) {
        self.shields_up = up;
    }

    /// Whether packets to this address are for the node.
    pub fn is_local(&self, address: IpAddr) -> bool {
        self.local.contains(address)
    }

    /// Judges a packet from a peer. Whether that peer may use its source address was checked when
    /// it was decrypted.
    pub fn inbound(&mut self, packet: &Packet<'_>, now: Instant) -> Verdict {
        self.adopts(now);
        if !self.is_local(packet.dst()) {
            return Verdict::Drop(Reason::ForeignDestination);
        }
        let flow = Flow::new(packet, Direction::Inbound);
        let answers = match packet.transport() {
            // Without the first fragment, the receiver throws later ones away.
            Transport::LaterFragment => return Verdict::Accept,
            Transport::Tcp { flags, .. } => {
                if self.allowed(packet) {
                    return Verdict::Accept;
                }
                !is_opening(flags) && self.answers_connection(flow, flags, now)
            }
            Transport::Icmp(Icmp::EchoReply { .. }) => {
                return if self.exchanges.get(flow, now).is_some() {
                    Verdict::Accept
                } else {
                    Verdict::Drop(Reason::NoFlow)
                };
            }
            Transport::Icmp(Icmp::Error) => {
                return if self.is_about_ours(packet, now) {
                    Verdict::Accept
                } else {
                    Verdict::Drop(Reason::NoFlow)
                };
            }
            Transport::Icmp(_) => {
                if self.allowed(packet) {
                    return Verdict::Accept;
                }
                false
            }
            Transport::Udp { .. } | Transport::Sctp { .. } | Transport::Other => {
                let ours = self.exchanges.get(flow, now).is_some();
                if !ours && self.allowed(packet) {
                    self.served.insert(flow, (), now);
                    return Verdict::Accept;
                }
                ours
            }
        };
        if answers {
            Verdict::Accept
        } else if self.shields_up {
            Verdict::Drop(Reason::ShieldsUp)
        } else {
            Verdict::Drop(Reason::NoRule)
        }
    }

    /// Judges a packet of the container and remembers what it begins.
    pub fn outbound(&mut self, packet: &Packet<'_>, now: Instant) -> Verdict {
        let adopts = self.adopts(now);
        let to_all = match packet.dst() {
            IpAddr::V4(dst) => dst.is_multicast() || dst.is_broadcast(),
            IpAddr::V6(dst) => dst.is_multicast(),
        };
        if to_all {
            return Verdict::Drop(Reason::Multicast);
        }
        if !self.is_local(packet.src()) {
            return Verdict::Drop(Reason::ForeignSource);
        }
        let flow = Flow::new(packet, Direction::Outbound);
        match packet.transport() {
            Transport::Tcp { flags, .. } if is_opening(flags) => {
                self.connections.remove(flow);
                self.exchanges.insert(flow, Phase::Open, now);
            }
            Transport::Tcp { flags, .. } => {
                if !self.answers_connection(flow, flags, now)
                    && adopts
                    && flags & (tcp_flags::FIN | tcp_flags::RST) == 0
                    && !self.was_allowed_back(packet)
                {
                    self.connections.insert(flow, (), now);
                }
            }
            Transport::Udp { .. } | Transport::Sctp { .. } | Transport::Other => {
                if self.exchanges.get(flow, now).is_none() && self.served.get(flow, now).is_none() {
                    self.exchanges.insert(flow, Phase::Open, now);
                }
            }
            Transport::Icmp(Icmp::EchoRequest { .. }) => {
                self.exchanges.insert(flow, Phase::Open, now);
            }
            Transport::Icmp(_) | Transport::LaterFragment => {}
        }
        Verdict::Accept
    }

    /// Whether connections are taken as the container's that it has already.
    fn adopts(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        if now.saturating_duration_since(since) >= ADOPTION {
            self.former.clear();
            return false;
        }
        self.former.len() < FORMER
    }

    /// Whether a TCP packet other than the first belongs to a connection that the container
    /// opened; follows the connection's life.
    fn answers_connection(&mut self, flow: Flow, flags: u8, now: Instant) -> bool {
        let closes = flags & (tcp_flags::FIN | tcp_flags::RST) != 0;
        if self.connections.get(flow, now).is_some() {
            if closes {
                self.connections.remove(flow);
                self.exchanges.insert(flow, Phase::Closing, now);
            }
            return true;
        }
        match self.exchanges.get(flow, now) {
            Some(phase) if closes => *phase = Phase::Closing,
            Some(Phase::Open) => {
                self.exchanges.remove(flow);
                self.connections.insert(flow, (), now);
            }
            Some(Phase::Closing) => {}
            None => return false,
        }
        true
    }

    /// Whether an ICMP error quotes a packet that the container sent: in a flow of its own, or in
    /// one that rules allow.
    fn is_about_ours(&mut self, packet: &Packet<'_>, now: Instant) -> bool {
        let Some(sent) = packet.quoted() else {
            return false;
        };
        if sent.src() != packet.dst() {
            return false;
        }
        let flow = Flow::new(&sent, Direction::Outbound);
        match sent.transport() {
            Transport::LaterFragment => false,
            // Errors are not answered with errors (RFC 1122, section 3.2.2).
            Transport::Icmp(Icmp::Error | Icmp::Other) => false,
            Transport::Icmp(Icmp::EchoRequest { .. }) => self.exchanges.get(flow, now).is_some(),
            _ => {
                self.connections.get(flow, now).is_some()
                    || self.exchanges.get(flow, now).is_some()
                    || self.allowed_back(&sent)
            }
        }
    }

    /// Whether a rule lets the packet in.
    fn allowed(&self, packet: &Packet<'_>) -> bool {
        let port = match packet.transport() {
            Transport::Tcp { dst, .. }
            | Transport::Udp { dst, .. }
            | Transport::Sctp { dst, .. } => Target::Port(dst),
            Transport::Icmp(_) => Target::Address,
            _ => Target::AllPorts,
        };
        !self.shields_up
            && self
                .rules
                .allow(packet.src(), packet.dst(), packet.protocol(), port)
    }

    /// Whether a rule lets in what the container's packet would answer.
    fn allowed_back(&self, packet: &Packet<'_>) -> bool {
        !self.shields_up && self.rules.allow_back(packet)
    }

    /// The same of the rules now and before.
    fn was_allowed_back(&self, packet: &Packet<'_>) -> bool {
        let mut rules = std::iter::once(&self.rules).chain(&self.former);
        rules.any(|rules| rules.allow_back(packet))
    }
}

/// Whether the packet opens a connection, rather than answers or goes on.
fn is_opening(flags: u8) -> bool {
    flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN
}

/// What of the destination a rule must cover.
#[derive(Clone, Copy)]
enum Target {
    /// Address and port.
    Port(u16),
    /// The address, for whatever protocol and ports: who may reach any port may also ping.
    Address,
    /// The address with all ports, for protocols that have none.
    AllPorts,
}

/// The rules of both address families.
#[derive(Debug, Default, PartialEq)]
struct Rules {
    v4: Vec<Rule<u32>>,
    v6: Vec<Rule<u128>>,
}

impl Rules {
    fn allow(&self, src: IpAddr, dst: IpAddr, protocol: u8, target: Target) -> bool {
        match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let (src, dst) = (src.to_bits(), dst.to_bits());
                self.v4
                    .iter()
                    .any(|rule| rule.allows(src, dst, protocol, target))
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let (src, dst) = (src.to_bits(), dst.to_bits());
                self.v6
                    .iter()
                    .any(|rule| rule.allows(src, dst, protocol, target))
            }
            _ => false,
        }
    }

    /// Whether they let in what the container's packet would answer.
    fn allow_back(&self, packet: &Packet<'_>) -> bool {
        let port = match packet.transport() {
            Transport::Tcp { src, .. }
            | Transport::Udp { src, .. }
            | Transport::Sctp { src, .. } => Target::Port(src),
            Transport::Icmp(_) => Target::Address,
            _ => Target::AllPorts,
        };
        self.allow(packet.dst(), packet.src(), packet.protocol(), port)
    }
}

/// A rule for one address family.
#[derive(Debug, PartialEq)]
struct Rule<A> {
    protocols: Protocols,
    sources: Spans<A>,
    /// First address, last address, ports.
    destinations: Box<[((A, A), PortRange)]>,
}

impl<A: Ord + Copy> Rule<A> {
    /// `None` if it could never match.
    fn new(
        protocols: Protocols,
        sources: Spans<A>,
        destinations: Vec<((A, A), PortRange)>,
    ) -> Option<Self> {
        (!sources.0.is_empty() && !destinations.is_empty()).then(|| Self {
            protocols,
            sources,
            destinations: destinations.into(),
        })
    }

    fn allows(&self, src: A, dst: A, protocol: u8, target: Target) -> bool {
        let ports_match = |ports: &PortRange| match target {
            Target::Port(port) => ports.first <= port && port <= ports.last,
            Target::Address => true,
            Target::AllPorts => (ports.first, ports.last) == (0, u16::MAX),
        };
        (matches!(target, Target::Address) || self.protocols.contains(protocol))
            && self
                .destinations
                .iter()
                .any(|((first, last), ports)| *first <= dst && dst <= *last && ports_match(ports))
            && self.sources.contains(src)
    }
}

/// A set of IP protocol numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Protocols([u64; 4]);

impl Protocols {
    fn new(numbers: &[i32]) -> Self {
        let mut set = Self::default();
        let usual = [
            protocol::TCP,
            protocol::UDP,
            protocol::ICMP,
            protocol::ICMPV6,
        ];
        if numbers.is_empty() {
            usual.into_iter().for_each(|number| set.add(number));
        }
        // Numbers that no packet has are what Go leaves out, too.
        let valid = numbers
            .iter()
            .filter_map(|number| u8::try_from(*number).ok());
        valid.for_each(|number| set.add(number));
        set
    }

    fn add(&mut self, number: u8) {
        self.0[usize::from(number >> 6)] |= 1 << (number & 63);
    }

    fn contains(&self, number: u8) -> bool {
        self.0[usize::from(number >> 6)] & 1 << (number & 63) != 0
    }
}

/// Addresses as spans from first to last, sorted, that do not overlap.
#[derive(Debug, PartialEq)]
struct Spans<A>(Box<[(A, A)]>);

impl<A> Default for Spans<A> {
    fn default() -> Self {
        Self(Box::default())
    }
}

impl<A: Ord + Copy> Spans<A> {
    fn new(mut spans: Vec<(A, A)>) -> Self {
        spans.sort_unstable();
        spans.dedup_by(|next, last| {
            let overlaps = next.0 <= last.1;
            if overlaps {
                last.1 = last.1.max(next.1);
            }
            overlaps
        });
        Self(spans.into())
    }

    fn contains(&self, address: A) -> bool {
        let after = self.0.partition_point(|(first, _)| *first <= address);
        after > 0 && address <= self.0[after - 1].1
    }
}

/// A set of addresses of both families.
#[derive(Debug, Default)]
struct Addresses {
    v4: Spans<u32>,
    v6: Spans<u128>,
}

impl Addresses {
    fn contains(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.v4.contains(address.to_bits()),
            IpAddr::V6(address) => self.v6.contains(address.to_bits()),
        }
    }
}

#[derive(Default)]
struct AddressesBuilder {
    v4: Vec<(u32, u32)>,
    v6: Vec<(u128, u128)>,
}

impl AddressesBuilder {
    /// Adds an address, a prefix, a range `a-b` or everything (`*`).
    fn parse(&mut self, text: &str) {
        if text == "*" {
            self.v4.push((0, u32::MAX));
            self.v6.push((0, u128::MAX));
            return;
        }
        let added = if text.contains('/') {
            // A prefix with bits set behind its length is somebody's mistake: guess nothing.
            let network = IpNet::from_str(text)
                .ok()
                .filter(|network| *network == network.trunc());
            network.is_some_and(|network| self.add(network.network(), network.broadcast()))
        } else {
            let (first, last) = text.split_once('-').unwrap_or((text, text));
            matches!((first.parse(), last.parse()), (Ok(first), Ok(last)) if self.add(first, last))
        };
        if !added {
            tracing::warn!(
                address = text,
                "access rule names addresses that cannot be read"
            );
        }
    }

    /// Adds all from first to last; false if they are not a range.
    fn add(&mut self, first: IpAddr, last: IpAddr) -> bool {
        if first > last {
            return false;
        }
        match (first, last) {
            (IpAddr::V4(first), IpAddr::V4(last)) => {
                self.v4.push((first.to_bits(), last.to_bits()))
            }
            (IpAddr::V6(first), IpAddr::V6(last)) => {
                self.v6.push((first.to_bits(), last.to_bits()))
            }
            _ => return false,
        }
        true
    }

    fn build(self) -> Addresses {
        Addresses {
            v4: Spans::new(self.v4),
            v6: Spans::new(self.v6),
        }
    }
}

#[derive(Clone, Copy)]
enum Direction {
    Inbound,
    Outbound,
}

/// What all packets of one flow have in common, in both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Flow {
    local: u128,
    remote: u128,
    /// The local port and the remote one; of pings the id twice; 0 without ports.
    ports: u32,
    protocol: u8,
}

impl Flow {
    fn new(packet: &Packet<'_>, direction: Direction) -> Self {
        let bits = |address| match address {
            IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
            IpAddr::V6(address) => address.to_bits(),
        };
        let (src, dst) = (bits(packet.src()), bits(packet.dst()));
        let (src_port, dst_port) = match packet.transport() {
            Transport::Tcp { src, dst, .. }
            | Transport::Udp { src, dst }
            | Transport::Sctp { src, dst } => (src, dst),
            Transport::Icmp(Icmp::EchoRequest { id } | Icmp::EchoReply { id }) => (id, id),
            _ => (0, 0),
        };
        let (local, remote, local_port, remote_port) = match direction {
            Direction::Outbound => (src, dst, src_port, dst_port),
            Direction::Inbound => (dst, src, dst_port, src_port),
        };
        Self {
            local,
            remote,
            ports: u32::from(local_port) << 16 | u32::from(remote_port),
            protocol: packet.protocol(),
        }
    }
}

/// Where a short-lived flow is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Begun; a TCP connection is remembered longer as soon as it goes on.
    Open,
    /// A side of the TCP connection has closed it.
    Closing,
}

/// Flows in two generations. What is used moves to the young one; after each timeout, or when the
/// young one is full, the old one is forgotten and the young one becomes old. So an entry costs no
/// clock of its own, and an idle table no memory.
#[derive(Debug)]
struct Flows<V> {
    young: HashMap<Flow, V>,
    old: HashMap<Flow, V>,
    timeout: Duration,
    turned: Option<Instant>,
}

impl<V> Flows<V> {
    fn new(timeout: Duration) -> Self {
        Self {
            young: HashMap::new(),
            old: HashMap::new(),
            timeout,
            turned: None,
        }
    }

    /// The flow's value, if it is remembered; then it is remembered anew.
    fn get(&mut self, flow: Flow, now: Instant) -> Option<&mut V> {
        self.pass(now);
        if self.young.is_empty() && self.old.is_empty() {
            return None;
        }
        if let Some(value) = self.old.remove(&flow) {
            self.insert(flow, value, now);
        }
        self.young.get_mut(&flow)
    }

    fn insert(&mut self, flow: Flow, value: V, now: Instant) {
        self.pass(now);
        self.old.remove(&flow);
        if self.young.len() >= GENERATION && !self.young.contains_key(&flow) {
            self.turn(now);
        }
        self.young.insert(flow, value);
    }

    fn remove(&mut self, flow: Flow) {
        self.young.remove(&flow);
        self.old.remove(&flow);
    }

    /// Lets time pass.
    fn pass(&mut self, now: Instant) {
        let turned = *self.turned.get_or_insert(now);
        let age = now.saturating_duration_since(turned);
        if age >= 2 * self.timeout {
            self.young = HashMap::new();
            self.turn(now);
        } else if age >= self.timeout {
            // As if on time, or entries would live up to three timeouts.
            self.turn(turned + self.timeout);
        }
    }

    fn turn(&mut self, at: Instant) {
        self.old = std::mem::take(&mut self.young);
        self.turned = Some(at);
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

    use proptest::{collection::vec, prelude::*, sample::select};
    use tailnode_wire::tailcfg::NetPortRange;

    use super::*;
    use crate::packet::{
        tcp_flags::{ACK, FIN, RST, SYN},
        tests::{icmp, raw, tcp},
        udp,
    };

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn rule(
        sources: &[&str],
        destination: &str,
        ports: (u16, u16),
        protocols: &[i32],
    ) -> FilterRule {
        FilterRule {
            src_ips: sources.iter().map(|s| s.to_string()).collect(),
            dst_ports: vec![NetPortRange {
                ip: destination.into(),
                ports: PortRange {
                    first: ports.0,
                    last: ports.1,
                },
            }],
            ip_proto: protocols.to_vec(),
            cap_grant: Vec::new(),
        }
    }

    fn filter(rules: &[FilterRule]) -> Filter {
        let mut filter = Filter::default();
        filter.set_local(&[
            "100.64.0.1/32".parse().unwrap(),
            "fd7a::1/128".parse().unwrap(),
        ]);
        filter.set_rules(rules, |_| Vec::new());
        filter
    }

    fn accepts_in(filter: &mut Filter, bytes: &[u8], now: Instant) -> bool {
        filter.inbound(&Packet::parse(bytes).unwrap(), now) == Verdict::Accept
    }

    fn accepts_out(filter: &mut Filter, bytes: &[u8], now: Instant) -> bool {
        filter.outbound(&Packet::parse(bytes).unwrap(), now) == Verdict::Accept
    }

    const US: &str = "100.64.0.1:40000";
    const PEER: &str = "100.64.0.2:80";

    /// A time at which a connection is not taken over from before a restart.
    fn settled(filter: &mut Filter) -> Instant {
        let start = Instant::now();
        accepts_in(filter, &tcp(addr(PEER), addr(US), RST), start);
        start + ADOPTION
    }

    #[test]
    fn the_default_is_closed() {
        let (mut filter, now) = (Filter::default(), Instant::now());
        assert!(!accepts_in(
            &mut filter,
            &tcp(addr(PEER), addr(US), SYN),
            now
        ));
        assert!(!accepts_out(
            &mut filter,
            &tcp(addr(US), addr(PEER), SYN),
            now
        ));
    }

    #[test]
    fn answers_come_in_without_rules() {
        let mut filter = filter(&[]);
        let now = settled(&mut filter);
        let (us, peer) = (addr(US), addr(PEER));
        for answer in [SYN, SYN | ACK, ACK, FIN | ACK, RST] {
            assert!(!accepts_in(&mut filter, &tcp(peer, us, answer), now));
        }
        assert!(accepts_out(&mut filter, &tcp(us, peer, SYN), now));
        assert!(accepts_in(&mut filter, &tcp(peer, us, SYN | ACK), now));
        assert!(accepts_out(&mut filter, &tcp(us, peer, ACK), now));
        assert!(accepts_in(&mut filter, &tcp(peer, us, ACK), now));
        assert!(
            !accepts_in(&mut filter, &tcp(peer, us, SYN), now),
            "a new connection"
        );
        let idle = now + CONNECTION_TIMEOUT - Duration::from_secs(1);
        assert!(accepts_in(&mut filter, &tcp(peer, us, ACK), idle));
        let later = idle + CONNECTION_TIMEOUT * 2;
        assert!(!accepts_in(&mut filter, &tcp(peer, us, ACK), later));

        assert!(!accepts_in(&mut filter, &udp(peer, us, b"x").unwrap(), now));
        assert!(accepts_out(&mut filter, &udp(us, peer, b"x").unwrap(), now));
        assert!(accepts_in(&mut filter, &udp(peer, us, b"x").unwrap(), now));
        assert!(!accepts_in(
            &mut filter,
            &udp(addr("100.64.0.2:81"), us, b"x").unwrap(),
            now
        ));
        assert!(
            !accepts_in(&mut filter, &tcp(peer, us, ACK), later),
            "another protocol"
        );

        let (us, peer) = (us.ip(), peer.ip());
        assert!(!accepts_in(&mut filter, &icmp(peer, us, 0, 7, b""), now));
        assert!(accepts_out(&mut filter, &icmp(us, peer, 8, 7, b""), now));
        assert!(accepts_in(&mut filter, &icmp(peer, us, 0, 7, b""), now));
        assert!(!accepts_in(&mut filter, &icmp(peer, us, 0, 8, b""), now));
        assert!(!accepts_in(&mut filter, &icmp(peer, us, 8, 7, b""), now));
    }

    #[test]
    fn closed_connections_are_forgotten_soon() {
        let mut filter = filter(&[]);
        let now = settled(&mut filter);
        let (us, peer) = (addr(US), addr(PEER));
        accepts_out(&mut filter, &tcp(us, peer, SYN), now);
        accepts_out(&mut filter, &tcp(us, peer, ACK), now);
        accepts_out(&mut filter, &tcp(us, peer, FIN | ACK), now);
        assert!(accepts_in(&mut filter, &tcp(peer, us, ACK), now));
        assert!(accepts_in(&mut filter, &tcp(peer, us, FIN | ACK), now));
        assert!(accepts_out(&mut filter, &tcp(us, peer, ACK), now));
        let later = now + EXCHANGE_TIMEOUT * 2;
        assert!(!accepts_in(&mut filter, &tcp(peer, us, ACK), later));
    }

    #[test]
    fn a_rule_taken_away_stops_flows_that_run() {
        let mut filter = filter(&[rule(&["100.64.0.2"], "100.64.0.1", (40000, 40000), &[])]);
        let now = settled(&mut filter);
        let (us, peer) = (addr(US), addr(PEER));
        let packets = |from, to| [tcp(from, to, ACK), udp(from, to, b"x").unwrap()];
        for packet in packets(peer, us) {
            assert!(accepts_in(&mut filter, &packet, now));
        }
        for packet in packets(us, peer) {
            assert!(accepts_out(&mut filter, &packet, now));
        }
        accepts_out(&mut filter, &tcp(addr("100.64.0.1:1"), peer, SYN), now);
        filter.set_rules([], |_| Vec::new());
        for packet in packets(us, peer) {
            assert!(accepts_out(&mut filter, &packet, now));
        }
        for packet in packets(peer, us) {
            assert!(!accepts_in(&mut filter, &packet, now));
        }
        assert!(accepts_in(
            &mut filter,
            &tcp(peer, addr("100.64.0.1:1"), SYN | ACK),
            now
        ));
    }

    #[test]
    fn connections_older_than_the_daemon_go_on() {
        let (us, peer) = (addr(US), addr(PEER));
        let now = Instant::now();
        let mut restarted = filter(&[]);
        assert!(accepts_out(&mut restarted, &tcp(us, peer, ACK), now));
        assert!(accepts_in(&mut restarted, &tcp(peer, us, ACK), now));
        // But not those that a rule has let in.
        let mut served = filter(&[rule(&["*"], "*", (40000, 40000), &[])]);
        assert!(accepts_out(&mut served, &tcp(us, peer, ACK), now));
        served.set_rules([], |_| Vec::new());
        assert!(!accepts_in(&mut served, &tcp(peer, us, ACK), now));
        // Nor when the container goes on with them after the rule is gone.
        assert!(accepts_out(&mut served, &tcp(us, peer, ACK), now));
        assert!(!accepts_in(&mut served, &tcp(peer, us, ACK), now));
    }

    #[test]
    fn many_rules_in_little_time_take_no_memory_and_no_connections() {
        let (us, peer) = (addr(US), addr(PEER));
        let mut filter = filter(&[]);
        for port in 0..1000 {
            filter.set_rules([&rule(&["*"], "*", (port, port), &[])], |_| Vec::new());
        }
        assert_eq!(filter.former.len(), FORMER);
        let now = Instant::now();
        assert!(accepts_out(&mut filter, &tcp(us, peer, ACK), now));
        assert!(!accepts_in(&mut filter, &tcp(peer, us, ACK), now));
        accepts_out(&mut filter, &tcp(us, peer, ACK), now + ADOPTION);
        assert!(filter.former.is_empty());
    }

    #[test]
    fn icmp_errors_must_be_about_our_packets() {
        let mut filter = filter(&[rule(&["100.64.0.2"], "100.64.0.1", (22, 22), &[])]);
        let now = settled(&mut filter);
        let (us, peer) = (addr(US), addr(PEER));
        let router: IpAddr = "100.64.0.9".parse().unwrap();
        let error = |sent: &[u8]| icmp(router, us.ip(), 3, 0, &sent[..28]);
        let sent = udp(us, peer, b"question").unwrap();
        assert!(!accepts_in(&mut filter, &error(&sent), now));
        accepts_out(&mut filter, &sent, now);
        assert!(accepts_in(&mut filter, &error(&sent), now));
        let connecting = tcp(us, peer, SYN);
        assert!(!accepts_in(&mut filter, &error(&connecting), now));
        accepts_out(&mut filter, &connecting, now);
        assert!(accepts_in(&mut filter, &error(&connecting), now));
        let serving = tcp(addr("100.64.0.1:22"), addr("100.64.0.2:999"), ACK);
        assert!(accepts_in(&mut filter, &error(&serving), now));
        let foreign = tcp(addr("100.64.0.7:22"), addr("100.64.0.2:999"), ACK);
        assert!(!accepts_in(&mut filter, &error(&foreign), now));
        assert!(!accepts_in(
            &mut filter,
            &icmp(router, us.ip(), 3, 0, b"garbage"),
            now
        ));
    }

    #[test]
    fn forms_of_rules() {
        let from = |source: &str| {
            let mut filter = Filter::default();
            filter.set_local(&[
                "100.64.0.1/32".parse().unwrap(),
                "fd7a::1/128".parse().unwrap(),
            ]);
            filter.set_rules([&rule(&[source], "*", (0, 65535), &[])], |capability| {
                assert_eq!(capability, "example.com/cap/x");
                vec!["100.64.0.2".parse().unwrap()]
            });
            let now = settled(&mut filter);
            let v6 = tcp(addr("[fd7a::2]:80"), addr("[fd7a::1]:40000"), SYN);
            (
                accepts_in(&mut filter, &tcp(addr(PEER), addr(US), SYN), now),
                accepts_in(&mut filter, &v6, now),
            )
        };
        assert_eq!(from("*"), (true, true));
        assert_eq!(from("100.64.0.2"), (true, false));
        assert_eq!(from("100.64.0.0/24"), (true, false));
        assert_eq!(from("fd7a::/48"), (false, true));
        assert_eq!(from("100.64.0.1-100.64.0.2"), (true, false));
        assert_eq!(from("fd7a::-fd7a::2"), (false, true));
        assert_eq!(from("cap:example.com/cap/x"), (true, false));
        for bad in [
            "100.64.0.1/24",
            "100.64.0.3-100.64.0.2",
            "100.64.0.1-fd7a::9",
            "x",
            "",
            "-",
        ] {
            assert_eq!(from(bad), (false, false), "{bad}");
        }
    }

    #[test]
    fn protocols_without_ports_need_all_ports() {
        let (us, peer) = (addr(US).ip(), addr(PEER).ip());
        let now = Instant::now();
        let gre = raw(peer, us, 47, &[0; 8]);
        for (ports, protocols, allowed) in [
            ((0, 65535), &[47][..], true),
            ((0, 65534), &[47], false),
            ((0, 65535), &[], false),
            ((0, 65535), &[6, -1, 303], false),
        ] {
            let mut filter = filter(&[rule(&["*"], "*", ports, protocols)]);
            assert_eq!(accepts_in(&mut filter, &gre, now), allowed);
        }
        let mut filter = filter(&[rule(&["*"], "100.64.0.1", (22, 22), &[6])]);
        assert!(
            accepts_in(&mut filter, &icmp(peer, us, 8, 1, b""), now),
            "any port, so ping"
        );
    }

    #[test]
    fn shields_and_addresses() {
        let mut filter = filter(&[rule(&["*"], "*", (0, 65535), &[])]);
        let now = settled(&mut filter);
        let (us, peer) = (addr(US), addr(PEER));
        let verdict =
            |filter: &mut Filter, bytes: &[u8]| filter.inbound(&Packet::parse(bytes).unwrap(), now);
        let foreign = tcp(peer, addr("100.64.0.3:1"), SYN);
        assert_eq!(
            verdict(&mut filter, &foreign),
            Verdict::Drop(Reason::ForeignDestination)
        );
        filter.set_shields_up(true);
        let opening = tcp(peer, us, SYN);
        assert_eq!(
            verdict(&mut filter, &opening),
            Verdict::Drop(Reason::ShieldsUp)
        );
        accepts_out(&mut filter, &tcp(us, peer, SYN), now);
        assert!(accepts_in(&mut filter, &tcp(peer, us, SYN | ACK), now));
        for (bytes, reason) in [
            (
                udp(addr("10.0.0.1:1"), peer, b"").unwrap(),
                Reason::ForeignSource,
            ),
            (
                udp(us, addr("224.0.0.251:5353"), b"").unwrap(),
                Reason::Multicast,
            ),
        ] {
            let packet = Packet::parse(&bytes).unwrap();
            assert_eq!(filter.outbound(&packet, now), Verdict::Drop(reason));
        }
    }

    #[test]
    fn the_table_is_bounded_and_keeps_what_is_used() {
        let mut filter = filter(&[]);
        let now = settled(&mut filter);
        let (us, peer) = (addr(US), addr(PEER));
        accepts_out(&mut filter, &udp(us, peer, b"").unwrap(), now);
        for n in 0..100_000u32 {
            let to = SocketAddr::from((Ipv4Addr::from_bits(0x6440_0100 + n), 53));
            accepts_out(&mut filter, &udp(us, to, b"").unwrap(), now);
            if n % 1000 == 0 {
                assert!(accepts_in(&mut filter, &udp(peer, us, b"").unwrap(), now));
            }
        }
        assert!(filter.exchanges.young.len() + filter.exchanges.old.len() <= 2 * GENERATION);
        accepts_in(
            &mut filter,
            &udp(peer, us, b"").unwrap(),
            now + EXCHANGE_TIMEOUT * 2,
        );
        assert_eq!(
            filter.exchanges.young.capacity() + filter.exchanges.old.capacity(),
            0
        );
    }

    /// A set of addresses in a form that rules are written in, to judge by hand.
    #[derive(Clone, Debug)]
    enum Form {
        All,
        Net(IpNet),
        Range(IpAddr, IpAddr),
    }

    impl Form {
        fn text(&self) -> String {
            match self {
                Self::All => "*".into(),
                Self::Net(net) if net.prefix_len() == net.max_prefix_len() => {
                    net.addr().to_string()
                }
                Self::Net(net) => net.to_string(),
                Self::Range(a, b) => format!("{a}-{b}"),
            }
        }

        fn contains(&self, address: IpAddr) -> bool {
            match self {
                Self::All => true,
                Self::Net(net) => net.contains(&address),
                Self::Range(a, b) => {
                    a.is_ipv4() == address.is_ipv4() && (*a..=*b).contains(&address)
                }
            }
        }
    }

    /// One of few addresses, so that rules meet packets.
    fn any_address() -> impl Strategy<Value = IpAddr> {
        (any::<bool>(), 0u8..8).prop_map(|(v4, n)| {
            if v4 {
                Ipv4Addr::new(100, 64, 0, n).into()
            } else {
                Ipv6Addr::from_bits(0xfd7a_115c_a1e0 << 80 | u128::from(n)).into()
            }
        })
    }

    fn any_form() -> impl Strategy<Value = Form> {
        prop_oneof![
            1 => Just(Form::All),
            4 => (any_address(), 0u8..4).prop_map(|(address, free)| {
                let length = if address.is_ipv4() { 32 } else { 128 };
                Form::Net(IpNet::new(address, length - free).unwrap().trunc())
            }),
            4 => (any_address(), any_address()).prop_filter_map("families", |(a, b)| {
                (a.is_ipv4() == b.is_ipv4()).then(|| Form::Range(a.min(b), a.max(b)))
            }),
        ]
    }

    type NaiveRule = (Vec<Form>, Vec<(Form, u16, u16)>, Vec<i32>);

    fn any_rule() -> impl Strategy<Value = NaiveRule> {
        (
            vec(any_form(), 0..4),
            vec((any_form(), 0u16..4, 0u16..4), 0..4),
            vec(select(&[6, 17, 132, 1, 58, 47]), 0..3),
        )
    }

    proptest! {
        #[test]
        fn rules_match_as_read_aloud(
            rules in vec(any_rule(), 0..5),
            (src, dst) in (any_address(), any_address()),
            port in 0u16..4,
            proto in select(&[6u8, 17, 132]),
        ) {
            prop_assume!(src.is_ipv4() == dst.is_ipv4());
            let written: Vec<_> = rules.iter().map(|(sources, destinations, protocols)| FilterRule {
                src_ips: sources.iter().map(Form::text).collect(),
                dst_ports: destinations.iter().map(|(form, first, last)| NetPortRange {
                    ip: form.text(),
                    ports: PortRange { first: *first, last: *last },
                }).collect(),
                ip_proto: protocols.clone(),
                cap_grant: Vec::new(),
            }).collect();
            let mut filter = Filter::default();
            filter.set_local(&[IpNet::new(dst, 8).unwrap()]);
            filter.set_rules(&written, |_| Vec::new());
            let expected = rules.iter().any(|(sources, destinations, protocols)| {
                (if protocols.is_empty() { proto != 132 } else { protocols.contains(&i32::from(proto)) })
                    && sources.iter().any(|form| form.contains(src))
                    && destinations.iter().any(|(form, first, last)| {
                        form.contains(dst) && (*first..=*last).contains(&port)
                    })
            });
            let (from, to) = (SocketAddr::new(src, 9), SocketAddr::new(dst, port));
            let bytes = match proto {
                6 => tcp(from, to, SYN),
                17 => udp(from, to, b"").unwrap(),
                _ => raw(src, dst, 132, &[0, 9, 0, port as u8, 0, 0, 0, 0, 0, 0, 0, 0]),
            };
            prop_assert_eq!(accepts_in(&mut filter, &bytes, Instant::now()), expected);
        }

        #[test]
        fn state_is_what_the_container_began(
            steps in vec((0u64..100, 0u16..3, 0u8..6), 1..80),
        ) {
            let mut filter = filter(&[]);
            let mut now = settled(&mut filter);
            // When each of three UDP and three TCP flows was last used, and whether TCP is open.
            let mut udp_used: [Option<Instant>; 3] = [None; 3];
            let mut tcp_used: [Option<(Instant, Duration)>; 3] = [None; 3];
            for (seconds, port, step) in steps {
                now += Duration::from_secs(seconds);
                let (us, peer) = (SocketAddr::new(addr(US).ip(), 1000 + port), addr(PEER));
                let index = usize::from(port);
                // Certain within the timeout and beyond twice that; between, either is right.
                let agrees = |accepted: bool, used: Option<(Instant, Duration)>| match used {
                    None => !accepted,
                    Some((at, timeout)) if now - at < timeout => accepted,
                    Some((at, timeout)) if now - at >= 2 * timeout => !accepted,
                    Some(_) => true,
                };
                match step {
                    0 => {
                        accepts_out(&mut filter, &udp(us, peer, b"").unwrap(), now);
                        udp_used[index] = Some(now);
                    }
                    1 => {
                        let accepted = accepts_in(&mut filter, &udp(peer, us, b"").unwrap(), now);
                        prop_assert!(agrees(accepted, udp_used[index].map(|at| (at, EXCHANGE_TIMEOUT))));
                        udp_used[index] = accepted.then_some(now);
                    }
                    2 => {
                        accepts_out(&mut filter, &tcp(us, peer, SYN), now);
                        tcp_used[index] = Some((now, EXCHANGE_TIMEOUT));
                    }
                    3 => {
                        let accepted = accepts_in(&mut filter, &tcp(peer, us, SYN | ACK), now);
                        prop_assert!(agrees(accepted, tcp_used[index]));
                        tcp_used[index] = accepted.then_some((now, CONNECTION_TIMEOUT));
                    }
                    4 => prop_assert!(!accepts_in(&mut filter, &tcp(peer, us, SYN), now)),
                    _ => {
                        // A packet in the middle, sent: it keeps what is there and begins nothing.
                        accepts_out(&mut filter, &tcp(us, peer, ACK), now);
                        let accepted = accepts_in(&mut filter, &tcp(peer, us, ACK), now);
                        prop_assert!(agrees(accepted, tcp_used[index]));
                        tcp_used[index] = accepted.then_some((now, CONNECTION_TIMEOUT));
                    }
                }
            }
        }
    }
}
