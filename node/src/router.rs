//! Where every packet of a node goes: the sans-IO heart of the packet path.
//!
//! Packets from the container, datagrams from UDP and from the relays, and the clock come in;
//! what to send where is collected in an [`Out`]. No channel and no allocation stand between a packet
//! and its datagram.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::Range,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use slab::Slab;
use tailnode_wire::{
    disco,
    keys::{DiscoPrivateKey, DiscoPublicKey, NodePublicKey},
    tailcfg::{self, NodeId, RegionId},
};
use tracing::{debug, trace};
use ts_bart::RoutingTable;

use crate::{
    filter::{Filter, Verdict},
    netmap::{Changes, Netmap},
    offload::Burst,
    packet::{self, Packet, Transport, protocol},
    path::{Action, Path, Route},
    routes::Preferences,
    state::Keys,
    status::{PeerPath, PeerStatus},
    wireguard::{self, Due, Heard, Identity, Kind, Tunnel},
};

/// MagicDNS, as every tailnet has it (net/tsaddr/tsaddr.go).
pub const SERVICE_V4: Ipv4Addr = Ipv4Addr::new(100, 100, 100, 100);
/// MagicDNS by IPv6 (net/tsaddr/tsaddr.go).
pub const SERVICE_V6: Ipv6Addr = Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0x53);

/// The lower bits of an index tell a peer's sessions apart, the others are its slot.
const INDEX_BITS: u32 = 8;
/// The first of a handshake's early repetitions; each waits twice as long as the one before.
/// Peers that have just started do not know each other yet, and WireGuard's own repetition comes
/// after 5 s, which is long for a container's first connection.
const RETRY_FIRST: Duration = Duration::from_millis(100);
/// From here on WireGuard's own repetition is soon enough.
const RETRY_LAST: Duration = Duration::from_secs(2);
/// How many callers we remember that no map has named yet, and for how long: until they repeat
/// their handshake by themselves.
const CALLERS: usize = 64;
const CALLED: Duration = Duration::from_secs(6);
/// How often all peers are looked through for one that sends in a session that we do not have.
const CALL_BACK_EVERY: Duration = Duration::from_millis(100);
/// How long the news of a peer's restart may be on its way.
const NEWS: Duration = Duration::from_secs(10);
/// WireGuard's times are in whole seconds; this is often enough to keep them.
const TICK_BUSY: Duration = Duration::from_millis(250);
const TICK_IDLE: Duration = Duration::from_secs(1);
/// The port at this address is a DERP region, where an address is wanted (tailcfg.DerpMagicIP).
const DERP_MAGIC_IP: Ipv4Addr = Ipv4Addr::new(127, 3, 3, 40);

/// Whom a route reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lead {
    /// A peer: it is its own address.
    ToPeer,
    /// A peer's subnet, or all that lies beyond an exit.
    Behind,
}

/// Where a datagram goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    /// By UDP.
    Address(SocketAddr),
    /// Through a relay.
    Relay(RegionId, NodePublicKey),
}

/// What the router wants sent: one buffer, and which part of it goes where.
#[derive(Debug, Default)]
pub struct Out {
    /// The first `len` bytes are in use; the rest is memory that need not be cleared again.
    bytes: Vec<u8>,
    len: usize,
    sends: Vec<(To, Range<usize>)>,
    /// Packets for the container, which nothing else waits for.
    tun: Vec<Range<usize>>,
}

impl Out {
    /// The datagrams in the order in which they were put. Those of one size to one address that
    /// lie one behind the other come as one train of at most `room(size)` bytes; the size of each
    /// is given too, and the last may be shorter.
    pub fn trains(
        &self,
        room: impl Fn(usize) -> usize,
    ) -> impl Iterator<Item = (To, &[u8], usize)> {
        let mut rest = self.sends.as_slice();
        std::iter::from_fn(move || {
            let ((to, first), mut behind) = rest.split_first()?;
            let (mut end, mut last) = (first.end, first.len());
            let room = if let To::Address(_) = to {
                room(first.len())
            } else {
                0
            };
            while let Some(((next_to, next), others)) = behind.split_first()
                && next_to == to
                && next.start == end
                && last == first.len()
                && next.len() <= first.len()
                && next.end - first.start <= room
            {
                (end, last) = (next.end, next.len());
                behind = others;
            }
            rest = behind;
            Some((*to, &self.bytes[first.start..end], first.len()))
        })
    }

    /// The packets for the container: where they lie, and the bytes that they lie in. Taking them
    /// out of the list is for the caller.
    pub fn for_container(&mut self) -> (&mut [u8], &mut Vec<Range<usize>>) {
        (&mut self.bytes, &mut self.tun)
    }

    /// Empties it and keeps its memory.
    pub fn clear(&mut self) {
        self.len = 0;
        self.sends.clear();
        self.tun.clear();
    }

    /// How many bytes wait; for bounding a batch.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Puts a ready datagram.
    pub fn put(&mut self, to: To, bytes: &[u8]) {
        let range = self.append(bytes);
        self.sends.push((to, range));
    }

    /// Puts the packets of a burst, each with room for what makes it a datagram.
    fn cut(&mut self, burst: &Burst<'_>, mut take: impl FnMut(Range<usize>)) {
        let room = self.room(burst.room(wireguard::OVERHEAD));
        let start = room.start;
        self.len = room.end;
        let (before, after) = (wireguard::HEADER, wireguard::TAG);
        burst.spread(&mut self.bytes[room], before, after, |packet| {
            take(start + packet.start..start + packet.end);
        });
    }

    fn append(&mut self, bytes: &[u8]) -> Range<usize> {
        let range = self.room(bytes.len());
        self.bytes[range.clone()].copy_from_slice(bytes);
        self.len = range.end;
        range
    }

    /// Memory at the end that is not in use yet.
    fn room(&mut self, len: usize) -> Range<usize> {
        let range = self.len..self.len + len;
        if self.bytes.len() < range.end {
            self.bytes.resize(range.end, 0);
        }
        range
    }
}

/// What is to become of a packet from the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It is for the peer in this slot; see [`Router::seal`].
    ForPeer(usize),
    /// It leads nowhere, or policy forbids it.
    Dropped,
    /// The resolver should answer it.
    ForResolver,
}

/// Where a datagram came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Address(SocketAddr),
    Relay(RegionId),
}

fn is_query(packet: &Packet<'_>) -> bool {
    matches!(
        packet.transport(),
        Transport::Udp { dst: 53, .. } | Transport::Tcp { dst: 53, .. }
    )
}

/// A tunnel whose index names the peer's slot in every datagram that comes back.
fn tunnel(peer: NodePublicKey, slot: usize, now: Instant) -> Box<Tunnel> {
    Box::new(Tunnel::new(peer, (slot as u32) << INDEX_BITS, now))
}

/// One node's peers and how to reach them.
pub struct Router {
    identity: Identity,
    node_key: NodePublicKey,
    disco: DiscoPrivateKey,
    peers: Slab<Peer>,
    by_id: HashMap<NodeId, usize>,
    by_key: HashMap<NodePublicKey, usize>,
    by_disco: HashMap<DiscoPublicKey, usize>,
    routes: ts_bart::Table<usize>,
    preferences: Preferences,
    takes_queries: bool,
    filter: Filter,
    /// Who began a handshake before the map named it.
    callers: VecDeque<(NodePublicKey, Instant)>,
    /// When a sender without a session was looked for among the peers.
    looked_for_caller: Option<Instant>,
    /// Slots with a tunnel, and some that had one until lately: what has timers to keep.
    in_use: BTreeSet<usize>,
    endpoints: Vec<SocketAddr>,
    /// Regions of the map whose relays are not known to be out of reach.
    relays: BTreeSet<RegionId>,
    lost_a_path: bool,
    // Memory that is kept from packet to packet.
    actions: Vec<Action>,
    datagrams: Vec<Range<usize>>,
}

struct Peer {
    id: NodeId,
    key: NodePublicKey,
    name: String,
    addresses: Vec<IpAddr>,
    online: Option<bool>,
    /// It may answer us but not begin anything.
    jailed: bool,
    disco: Option<DiscoPublicKey>,
    /// Made when the first disco message to or from the peer needs it.
    sealed: Option<disco::Pair>,
    routes: Vec<IpNet>,
    /// WireGuard's state, some KiB; only for peers in use.
    tunnel: Option<Box<Tunnel>>,
    /// While a first handshake goes unanswered: when to repeat it, and how long to wait after.
    retry: Option<(Instant, Duration)>,
    path: Path,
    /// Where the peer's map entry says it is found; 0: unknown.
    home: RegionId,
    /// Where the peer's last relayed datagram came from; 0: none yet.
    seen_at: RegionId,
    rx_bytes: u64,
    tx_bytes: u64,
}

impl Peer {
    /// By which of the `relays` that we can use it is reached: its home, or else where it came from.
    fn relay(&self, relays: &BTreeSet<RegionId>) -> Option<To> {
        let region = if relays.contains(&self.home) || self.seen_at == 0 {
            self.home
        } else {
            self.seen_at
        };
        (region != 0).then_some(To::Relay(region, self.key))
    }

    /// What is taken from it besides its own addresses.
    fn subnets(&self) -> impl Iterator<Item = IpNet> {
        let is_subnet = |net: &&IpNet| !self.addresses.contains(&net.addr());
        self.routes.iter().filter(is_subnet).copied()
    }

    fn is_in_session(&self, now: Instant) -> bool {
        let tunnel = self.tunnel.as_ref();
        tunnel.is_some_and(|tunnel| tunnel.is_ready(now))
    }
}

impl Router {
    /// A router without peers that lets nothing in.
    pub fn new(keys: &Keys) -> Self {
        Self {
            identity: Identity::new(keys.node.clone()),
            node_key: keys.node.public,
            disco: keys.disco.private.clone(),
            peers: Slab::new(),
            by_id: HashMap::new(),
            by_key: HashMap::new(),
            by_disco: HashMap::new(),
            routes: ts_bart::Table::default(),
            preferences: Preferences::default(),
            takes_queries: true,
            filter: Filter::default(),
            callers: VecDeque::new(),
            looked_for_caller: None,
            in_use: BTreeSet::new(),
            endpoints: Vec::new(),
            relays: BTreeSet::new(),
            lost_a_path: false,
            actions: Vec::new(),
            datagrams: Vec::new(),
        }
    }

    /// Says which routes to take and to offer; to be called before the first map.
    pub fn prefer(&mut self, preferences: Preferences) {
        self.preferences = preferences;
    }

    /// Whether the resolver answers what the container asks of servers that are no peers, as it does
    /// at first. What is asked of its own address it always does.
    pub fn take_queries(&mut self, take: bool) {
        self.takes_queries = take;
    }

    /// Takes over what `changes` names from the map. Returns what may lead elsewhere now: see
    /// [`Router::leads`].
    pub fn update(&mut self, netmap: &Netmap, changes: &Changes, now: Instant) -> Vec<IpNet> {
        let mut rerouted = Vec::new();
        if changes.all_peers {
            let gone: Vec<NodeId> = self
                .by_id
                .keys()
                .filter(|id| !netmap.peers.contains_key(id))
                .copied()
                .collect();
            for id in gone {
                self.remove(id, &mut rerouted);
            }
            for node in netmap.peers.values() {
                self.upsert(node, &netmap.myself, now, &mut rerouted);
            }
        } else {
            for id in &changes.peers {
                match netmap.peers.get(id) {
                    Some(node) => self.upsert(node, &netmap.myself, now, &mut rerouted),
                    None => self.remove(*id, &mut rerouted),
                }
            }
        }
        if changes.myself {
            let local = self.preferences.local(&netmap.myself);
            self.filter.set_local(&local);
        }
        // Rules may name peers by capability; those change with the peers.
        let by_capability = || {
            let mut sources = netmap.filter_rules().flat_map(|rule| &rule.src_ips);
            sources.any(|source| source.starts_with("cap:"))
        };
        let peers_changed = changes.all_peers || !changes.peers.is_empty();
        if changes.filter || peers_changed && by_capability() {
            self.filter.set_rules(netmap.filter_rules(), |capability| {
                let holders = netmap
                    .peers
                    .values()
                    .filter(|node| node.cap_map.contains_key(capability));
                holders
                    .flat_map(|node| node.addresses.iter().map(IpNet::addr))
                    .collect()
            });
        }
        rerouted
    }

    /// Who is reached by a route: a peer itself, somebody behind one, or nobody.
    pub fn leads(&self, net: IpNet) -> Option<Lead> {
        let slot = self.routes.lookup_prefix_exact(net)?;
        let own = self.peers[*slot].addresses.contains(&net.addr());
        Some(match net.prefix_len() == net.max_prefix_len() && own {
            true => Lead::ToPeer,
            false => Lead::Behind,
        })
    }

    /// Takes the regions whose relays can be used.
    pub fn set_relays(&mut self, regions: BTreeSet<RegionId>) {
        self.relays = regions;
    }

    /// Takes a new node key; every session begins anew.
    pub fn set_keys(&mut self, keys: &Keys) {
        self.identity = Identity::new(keys.node.clone());
        self.node_key = keys.node.public;
        for (_, peer) in &mut self.peers {
            peer.tunnel = None;
            peer.retry = None;
        }
    }

    /// Our own addresses, as peers are told when they are called.
    pub fn set_endpoints(&mut self, endpoints: Vec<SocketAddr>) {
        if self.endpoints == endpoints {
            return;
        }
        self.endpoints = endpoints;
        for (_, peer) in &mut self.peers {
            peer.path.moved();
        }
    }

    /// Whether a handshake of ours has not been answered.
    pub fn waits_for_peers(&self) -> bool {
        let mut in_use = self.in_use.iter();
        in_use.any(|&slot| {
            self.peers
                .get(slot)
                .is_some_and(|peer| peer.retry.is_some())
        })
    }

    /// Whether an address in use has stopped answering since this was asked last.
    pub fn has_lost_a_path(&mut self) -> bool {
        std::mem::take(&mut self.lost_a_path)
    }

    /// Our own network changed: what was measured is void.
    pub fn reset_paths(&mut self) {
        for (_, peer) in &mut self.peers {
            peer.path.reset();
        }
    }

    /// Judges what the container sends: once for a burst, all of which is of one flow.
    pub fn outbound(&mut self, packet: &Packet<'_>, now: Instant) -> Taken {
        let slot = self.routes.lookup(packet.dst()).copied();
        // Port 53 of a server that is no peer's is a query that the engine's own resolver sent on.
        if packet.dst() == SERVICE_V4
            || packet.dst() == SERVICE_V6
            || self.takes_queries
                && is_query(packet)
                && slot.is_none_or(|slot| self.leads_out(slot, packet.dst()))
        {
            return Taken::ForResolver;
        }
        match slot {
            Some(slot) => self.leave(slot, packet, now),
            None => Taken::Dropped,
        }
    }

    /// The same for a question of the node's own resolver.
    pub fn question(&mut self, packet: &Packet<'_>, now: Instant) -> Taken {
        match self.routes.lookup(packet.dst()) {
            Some(&slot) => self.leave(slot, packet, now),
            None => Taken::Dropped,
        }
    }

    /// Whether an address is reached through the peer only because that is the exit.
    fn leads_out(&self, slot: usize, address: IpAddr) -> bool {
        let mut routes = self.peers[slot].routes.iter();
        !routes.any(|net| net.prefix_len() > 0 && net.contains(&address))
    }

    fn leave(&mut self, slot: usize, packet: &Packet<'_>, now: Instant) -> Taken {
        if !self.may_leave(packet, now) {
            return Taken::Dropped;
        }
        self.peers[slot].tx_bytes += packet.bytes().len() as u64;
        Taken::ForPeer(slot)
    }

    /// Whether the container may send a packet, also by another way than the tunnel.
    pub fn may_leave(&mut self, packet: &Packet<'_>, now: Instant) -> bool {
        // Nodes talk among themselves by it, and peers believe it.
        if packet.protocol() == protocol::TSMP {
            return false;
        }
        let verdict = self.filter.outbound(packet, now);
        if let Verdict::Drop(reason) = verdict {
            trace!(?reason, dst = %packet.dst(), "dropped an outgoing packet");
        }
        verdict == Verdict::Accept
    }

    /// Whether policy lets in what the node with the key `from` brings without the tunnel.
    pub fn enter(&mut self, from: &NodePublicKey, packet: &Packet<'_>, now: Instant) -> bool {
        let Some(&slot) = self.routes.lookup(packet.src()) else {
            return false;
        };
        let accepted =
            self.peers[slot].key == *from && self.inbound(slot, packet, now) == Verdict::Accept;
        if accepted {
            self.peers[slot].rx_bytes += packet.bytes().len() as u64;
        }
        accepted
    }

    /// Our own key, by which peers know us.
    pub fn key(&self) -> NodePublicKey {
        self.node_key
    }

    /// The key of the peer in a slot that [`Taken::ForPeer`] named.
    pub fn peer_key(&self, slot: usize) -> NodePublicKey {
        self.peers[slot].key
    }

    /// Datagrams from UDP, one behind the other, that are not STUN's: `size` bytes each, but the last
    /// may be shorter.
    pub fn on_udp(
        &mut self,
        from: SocketAddr,
        train: &[u8],
        size: usize,
        now: Instant,
        out: &mut Out,
    ) {
        // A socket for both families shows IPv4 addresses as mapped ones.
        let from = SocketAddr::new(from.ip().to_canonical(), from.port());
        let mut rest = train;
        while !rest.is_empty() {
            let first = &rest[..size.min(rest.len())];
            let run = match Kind::of(first) {
                Some(Kind::Data(index)) => {
                    // Those of one session are opened side by side.
                    let alike = |datagram: &&[u8]| Kind::of(datagram) == Some(Kind::Data(index));
                    let datagrams = rest.chunks(size).take_while(alike);
                    let run = &rest[..datagrams.map(<[u8]>::len).sum()];
                    self.data(None, index, (run, size), Origin::Address(from), now, out);
                    run
                }
                Some(kind) => {
                    self.handshake(None, kind, first, Origin::Address(from), now, out);
                    first
                }
                None => {
                    self.disco(first, Origin::Address(from), now, out);
                    first
                }
            };
            rest = &rest[run.len()..];
        }
    }

    /// A datagram that the relay of `region` brought from `key`.
    pub fn on_relay(
        &mut self,
        region: RegionId,
        key: &NodePublicKey,
        datagram: &[u8],
        now: Instant,
        out: &mut Out,
    ) {
        let kind = Kind::of(datagram);
        let Some(&slot) = self.by_key.get(key) else {
            if kind == Some(Kind::Initiation) {
                self.called(*key, now);
            }
            return;
        };
        self.peers[slot].seen_at = region;
        // A relay vouches for the sender: nobody else's datagrams under its name.
        match kind {
            Some(Kind::Data(index)) => {
                let train = (datagram, datagram.len());
                self.data(Some(slot), index, train, Origin::Relay(region), now, out);
            }
            Some(kind) => {
                self.handshake(Some(slot), kind, datagram, Origin::Relay(region), now, out);
            }
            None => self.disco(datagram, Origin::Relay(region), now, out),
        }
    }

    /// An address refused what we sent to it.
    pub fn unreachable(&mut self, address: SocketAddr) {
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        for (_, peer) in &mut self.peers {
            peer.path.failed(address);
        }
    }

    /// Does what time has made due. Returns when to call it again; `None`: after the next packet.
    pub fn tick(&mut self, now: Instant, out: &mut Out) -> Option<Instant> {
        let mut next: Option<Instant> = None;
        let mut in_use = std::mem::take(&mut self.in_use);
        in_use.retain(|&slot| {
            let peer = self.peers.get(slot);
            peer.is_some_and(|peer| peer.tunnel.is_some())
        });
        for &slot in &in_use {
            let peer = &mut self.peers[slot];
            let busy = peer.path.active(now);
            let mut actions = std::mem::take(&mut self.actions);
            peer.path.tick(now, &mut actions);
            if let Some(tunnel) = &mut peer.tunnel {
                match tunnel.tick(now) {
                    Due::Nothing => {}
                    Due::Handshake => {
                        let range = out.append(&tunnel.initiate(&mut self.identity, now));
                        self.send_by(slot, None, range, now, out);
                    }
                    Due::Keepalive => {
                        let range = out.append(&[0; wireguard::OVERHEAD]);
                        if tunnel.seal(&mut out.bytes, std::slice::from_ref(&range), now) {
                            self.send_by(slot, None, range, now, out);
                        }
                    }
                    Due::Expired => {
                        peer.tunnel = None;
                        peer.retry = None;
                    }
                }
            }
            self.act(slot, &mut actions, out);
            self.actions = actions;
            if self.peers[slot].retry.is_some_and(|(at, _)| now >= at) {
                self.retry(slot, now, out);
            }
            let mut due = now + if busy { TICK_BUSY } else { TICK_IDLE };
            if let Some((at, _)) = self.peers[slot].retry {
                due = due.min(at);
            }
            next = Some(next.map_or(due, |next| next.min(due)));
        }
        self.in_use = in_use;
        next
    }

    /// The peers and how packets to them travel, by name. `region` names a DERP region; `is_near`
    /// tells who is reached without a tunnel.
    pub fn peers(
        &self,
        now: Instant,
        region: impl Fn(RegionId) -> String,
        is_near: impl Fn(&NodePublicKey) -> bool,
    ) -> Vec<PeerStatus> {
        let mut peers: Vec<_> = self
            .peers
            .iter()
            .map(|(_, peer)| PeerStatus {
                name: peer.name.clone(),
                addresses: peer.addresses.clone(),
                online: peer.online,
                routes: peer.subnets().collect(),
                path: match peer.path.direct(now) {
                    _ if is_near(&peer.key) => PeerPath::Local,
                    Some(address) => PeerPath::Direct { address },
                    None => match peer.relay(&self.relays) {
                        Some(To::Relay(id, _)) if peer.path.active(now) => {
                            PeerPath::Relay { region: region(id) }
                        }
                        _ => PeerPath::Idle,
                    },
                },
                rx_bytes: peer.rx_bytes,
                tx_bytes: peer.tx_bytes,
            })
            .collect();
        peers.sort_by(|a, b| a.name.cmp(&b.name));
        peers
    }

    fn upsert(
        &mut self,
        node: &tailcfg::Node,
        myself: &tailcfg::Node,
        now: Instant,
        rerouted: &mut Vec<IpNet>,
    ) {
        // A peer with a new key is another WireGuard peer: begin anew.
        if let Some(&slot) = self.by_id.get(&node.id)
            && self.peers[slot].key != node.key
        {
            self.remove(node.id, rerouted);
        }
        if node.expired {
            return self.remove(node.id, rerouted);
        }
        let called = |&(key, at): &(NodePublicKey, Instant)| key == node.key && now < at + CALLED;
        let slot = *self.by_id.entry(node.id).or_insert_with(|| {
            let calls_back = self.callers.iter().any(called);
            self.peers.insert(Peer {
                id: node.id,
                key: node.key,
                name: String::new(),
                addresses: Vec::new(),
                online: None,
                jailed: false,
                disco: None,
                sealed: None,
                routes: Vec::new(),
                tunnel: None,
                retry: calls_back.then_some((now, RETRY_FIRST)),
                path: Path::default(),
                home: 0,
                seen_at: 0,
                rx_bytes: 0,
                tx_bytes: 0,
            })
        });
        self.by_key.insert(node.key, slot);
        let peer = &mut self.peers[slot];
        if peer.retry.is_some() && peer.tunnel.is_none() {
            peer.tunnel = Some(tunnel(peer.key, slot, now));
            self.in_use.insert(slot);
        }
        if let Some((at, _)) = &mut peer.retry {
            // Now it may be where it could not be reached a moment ago.
            *at = now;
        }
        let name = node.name.trim_end_matches('.');
        if peer.name != name {
            peer.name = name.to_owned();
        }
        let addresses = node.addresses.iter().map(IpNet::addr);
        if !addresses.clone().eq(peer.addresses.iter().copied()) {
            peer.addresses = addresses.collect();
        }
        peer.online = node.online;
        peer.jailed = node.is_jailed;
        peer.home = node.derp_region();
        peer.path.set_endpoints(&node.endpoints);
        if peer.disco != node.disco_key {
            if let Some(old) = peer.disco.take() {
                if self.by_disco.get(&old) == Some(&slot) {
                    self.by_disco.remove(&old);
                }
                // The peer restarted: its sockets, and so its addresses, are new, and it knows our
                // session no more. Whatever is younger than the news was begun since.
                peer.path.reset();
                let age = peer.tunnel.as_ref().and_then(|tunnel| tunnel.age(now));
                if peer.retry.is_none() && age.is_none_or(|age| age > NEWS) {
                    peer.tunnel = None;
                }
            }
            peer.sealed = None;
            peer.disco = node.disco_key;
            if let Some(new) = node.disco_key {
                self.by_disco.insert(new, slot);
            }
        }
        let routes = self.preferences.taken(node, myself);
        if peer.routes != routes {
            for net in std::mem::replace(&mut peer.routes, routes.clone()) {
                self.take_route(net, slot);
                rerouted.push(net);
            }
            for net in routes {
                self.routes.insert(net, slot);
                rerouted.push(net);
            }
        }
    }

    /// Takes a route from a peer that has it. Of several who may have a subnet, another gets it.
    fn take_route(&mut self, net: IpNet, from: usize) {
        if self.routes.lookup_prefix_exact(net) != Some(&from) {
            return;
        }
        let mut others = self.peers.iter().filter(|(slot, _)| *slot != from);
        let heir = match net.prefix_len() == net.max_prefix_len() {
            true => None,
            false => others.find(|(_, peer)| peer.routes.contains(&net)),
        };
        match heir.map(|(slot, _)| slot) {
            Some(slot) => self.routes.insert(net, slot),
            None => self.routes.remove(net),
        };
    }

    fn remove(&mut self, id: NodeId, rerouted: &mut Vec<IpNet>) {
        let Some(slot) = self.by_id.remove(&id) else {
            return;
        };
        let peer = self.peers.remove(slot);
        // A successor may have taken over keys and addresses before this one left.
        if self.by_key.get(&peer.key) == Some(&slot) {
            self.by_key.remove(&peer.key);
        }
        if let Some(key) = peer.disco
            && self.by_disco.get(&key) == Some(&slot)
        {
            self.by_disco.remove(&key);
        }
        for net in peer.routes {
            self.take_route(net, slot);
            rerouted.push(net);
        }
        debug!(peer = %peer.name, id = peer.id, "peer removed");
    }

    /// Remembers a node that talks to us before the map names it: as soon as it does, we call back,
    /// since WireGuard's own repetition comes after 5 s only.
    fn called(&mut self, key: NodePublicKey, now: Instant) {
        self.callers.retain(|(caller, _)| *caller != key);
        if self.callers.len() == CALLERS {
            self.callers.pop_front();
        }
        self.callers.push_back((key, now));
    }

    /// Datagrams of a session, whose index begins with its peer's slot. `sender`: whom a relay names.
    fn data(
        &mut self,
        sender: Option<usize>,
        index: u32,
        train: (&[u8], usize),
        from: Origin,
        now: Instant,
        out: &mut Out,
    ) {
        let slot = (index >> INDEX_BITS) as usize;
        let peer = self.peers.get_mut(slot);
        let peer = peer.filter(|_| sender.is_none_or(|sender| sender == slot));
        let room = out.room(train.0.len());
        let start = room.start;
        let mut packets = std::mem::take(&mut self.datagrams);
        let tunnel = peer.and_then(|peer| peer.tunnel.as_mut());
        let is_known = tunnel.is_some_and(|tunnel| {
            tunnel.open(index, train, now, &mut out.bytes[room], |packet| {
                packets.push(start + packet.start..start + packet.end);
            })
        });
        if !is_known {
            self.datagrams = packets;
            return self.call_back(sender, from, now, out);
        }
        out.len = packets.last().map_or(start, |last| last.end);
        self.deliver(slot, &packets, now, out);
        packets.clear();
        self.datagrams = packets;
        self.settle(slot, now, out);
    }

    /// Somebody goes on with a session that we do not have, because we were restarted since. If it is
    /// a peer, as it seems, we begin another; it would miss our answers for 15 s before it did.
    fn call_back(&mut self, sender: Option<usize>, from: Origin, now: Instant, out: &mut Out) {
        let looked_at = self
            .looked_for_caller
            .filter(|&at| now < at + CALL_BACK_EVERY);
        let slot = match (sender, from) {
            (Some(slot), _) => slot,
            // To look through all peers takes long.
            (None, Origin::Address(address)) if looked_at.is_none() => {
                self.looked_for_caller = Some(now);
                let mut peers = self.peers.iter();
                match peers.find(|(_, peer)| peer.path.knows(address)) {
                    Some((slot, _)) => slot,
                    None => return,
                }
            }
            (None, _) => return,
        };
        let peer = &mut self.peers[slot];
        let has_begun = |tunnel: &Tunnel| tunnel.is_initiating() || tunnel.age(now).is_some();
        if !peer.tunnel.as_deref().is_some_and(has_begun) {
            debug!(peer = %peer.name, "it goes on with a session from before our start");
            let tunnel = peer.tunnel.get_or_insert_with(|| {
                self.in_use.insert(slot);
                tunnel(peer.key, slot, now)
            });
            peer.retry = Some((now + RETRY_FIRST, RETRY_FIRST));
            let range = out.append(&tunnel.initiate(&mut self.identity, now));
            self.send(slot, range, now, out);
        }
    }

    /// A message of a handshake.
    fn handshake(
        &mut self,
        sender: Option<usize>,
        kind: Kind,
        message: &[u8],
        from: Origin,
        now: Instant,
        out: &mut Out,
    ) {
        let source = match from {
            Origin::Address(address) => Some(address.ip()),
            Origin::Relay(_) => None,
        };
        let (index, initiation) = match kind {
            Kind::Initiation | Kind::Response(_) => {
                match (self.identity.hear(message, source, now), kind) {
                    (Heard::Initiation(initiation), _) => (0, Some(initiation)),
                    (Heard::Response, Kind::Response(index)) => (index, None),
                    (Heard::Cookie(reply), _) => {
                        if let Origin::Address(address) = from {
                            out.put(To::Address(address), &reply);
                        }
                        return;
                    }
                    (Heard::Nothing | Heard::Response, _) => return,
                }
            }
            Kind::Cookie(index) | Kind::Data(index) => (index, None),
        };
        let slot = match &initiation {
            None => (index >> INDEX_BITS) as usize,
            Some(initiation) => match self.by_key.get(&initiation.peer) {
                Some(&slot) => slot,
                None => return self.called(initiation.peer, now),
            },
        };
        if sender.is_some_and(|sender| sender != slot) {
            return;
        }
        let Some(peer) = self.peers.get_mut(slot) else {
            return;
        };
        if let Some(initiation) = initiation {
            let tunnel = peer.tunnel.get_or_insert_with(|| {
                self.in_use.insert(slot);
                tunnel(peer.key, slot, now)
            });
            let Some(response) = tunnel.respond(*initiation, &mut self.identity, now) else {
                return;
            };
            if let Some(direct) = peer.path.direct(now)
                && from != Origin::Address(direct)
            {
                peer.path.doubt(now);
            }
            let range = out.append(&response);
            self.send(slot, range, now, out);
        } else if let Some(tunnel) = &mut peer.tunnel {
            if let Kind::Cookie(_) = kind {
                tunnel.take_cookie(message, now);
            } else if tunnel.finish(&self.identity, index, message, now) {
                peer.retry = None;
                if !self.send_waiting(slot, now, out) {
                    let range = out.append(&[0; wireguard::OVERHEAD]);
                    self.seal_all(slot, &[range], now, out);
                }
            }
        }
        self.settle(slot, now, out);
    }

    /// The peer's own handshake may have come to its end before ours did, also long after we gave up
    /// repeating it.
    fn settle(&mut self, slot: usize, now: Instant, out: &mut Out) {
        let peer = &mut self.peers[slot];
        if peer.is_in_session(now) {
            peer.retry = None;
            self.send_waiting(slot, now, out);
        }
    }

    /// Sends what waited for the handshake that has just ended. Returns whether there was anything.
    fn send_waiting(&mut self, slot: usize, now: Instant, out: &mut Out) -> bool {
        let Some(tunnel) = &mut self.peers[slot].tunnel else {
            return false;
        };
        let waiting = tunnel.take_waiting();
        if waiting.is_empty() {
            return false;
        }
        let mut datagrams = Vec::new();
        for packet in &waiting {
            out.cut(&Burst::whole(packet), |datagram| datagrams.push(datagram));
        }
        self.seal_all(slot, &datagrams, now, out);
        true
    }

    /// Repeats a first handshake that has not been answered.
    fn retry(&mut self, slot: usize, now: Instant, out: &mut Out) {
        let peer = &mut self.peers[slot];
        let (Some((_, wait)), Some(tunnel)) = (peer.retry, &mut peer.tunnel) else {
            return;
        };
        peer.retry = (wait < RETRY_LAST).then_some((now + 2 * wait, 2 * wait));
        let range = out.append(&tunnel.initiate(&mut self.identity, now));
        self.send(slot, range, now, out);
    }

    /// Decrypted packets from a peer: may it send them, and does policy let them in?
    fn deliver(&mut self, slot: usize, packets: &[Range<usize>], now: Instant, out: &mut Out) {
        let mut accepted: Option<Packet<'_>> = None;
        let mut pongs = Vec::new();
        for range in packets {
            // A train is of one flow mostly: it is judged by its first packet.
            let bytes = &out.bytes[range.clone()];
            if let Some(len) = accepted.and_then(|packet| packet.goes_on_in(bytes)) {
                self.peers[slot].rx_bytes += len as u64;
                out.tun.push(range.start..range.start + len);
                continue;
            }
            let Ok(packet) = Packet::parse(bytes) else {
                continue;
            };
            if self.routes.lookup(packet.src()) != Some(&slot) {
                trace!(src = %packet.src(), peer = %self.peers[slot].name, "dropped a packet with another's address");
                continue;
            }
            if packet.protocol() == protocol::TSMP {
                let ours = self.filter.is_local(packet.dst());
                pongs.extend(packet::tsmp_pong(&packet).filter(|_| ours));
                continue;
            }
            match self.inbound(slot, &packet, now) {
                Verdict::Accept => {
                    // Some peers fill packets up to a multiple of 16.
                    let len = packet.bytes().len();
                    self.peers[slot].rx_bytes += len as u64;
                    out.tun.push(range.start..range.start + len);
                    accepted = Some(packet);
                }
                Verdict::Drop(reason) => {
                    trace!(?reason, src = %packet.src(), dst = %packet.dst(), "policy dropped a packet");
                }
            }
        }
        for pong in pongs {
            self.seal(slot, &Burst::whole(&pong), now, out);
        }
    }

    /// What policy says of a packet from a peer.
    fn inbound(&mut self, slot: usize, packet: &Packet<'_>, now: Instant) -> Verdict {
        self.filter.set_shields_up(self.peers[slot].jailed);
        let verdict = self.filter.inbound(packet, now);
        self.filter.set_shields_up(false);
        verdict
    }

    /// Encrypts packets and sends them, or keeps them for the end of the handshake that they begin.
    pub fn seal(&mut self, slot: usize, burst: &Burst<'_>, now: Instant, out: &mut Out) {
        let peer = &mut self.peers[slot];
        let tunnel = peer.tunnel.get_or_insert_with(|| {
            self.in_use.insert(slot);
            tunnel(peer.key, slot, now)
        });
        if tunnel.is_ready(now) {
            let mut datagrams = std::mem::take(&mut self.datagrams);
            out.cut(burst, |datagram| datagrams.push(datagram));
            self.seal_all(slot, &datagrams, now, out);
            datagrams.clear();
            self.datagrams = datagrams;
            return;
        }
        burst.packets(&mut Vec::new(), |packet| tunnel.wait(packet));
        if !tunnel.is_initiating() {
            peer.retry = Some((now + RETRY_FIRST, RETRY_FIRST));
            let range = out.append(&tunnel.initiate(&mut self.identity, now));
            self.send(slot, range, now, out);
        }
    }

    /// Makes datagrams of the packets in them, and sends them.
    fn seal_all(&mut self, slot: usize, datagrams: &[Range<usize>], now: Instant, out: &mut Out) {
        if let Some(tunnel) = &mut self.peers[slot].tunnel
            && tunnel.seal(&mut out.bytes, datagrams, now)
        {
            self.send_all(slot, datagrams.iter().cloned(), now, out);
        }
    }

    fn send(&mut self, slot: usize, range: Range<usize>, now: Instant, out: &mut Out) {
        self.send_all(slot, std::iter::once(range), now, out);
    }

    fn send_all(
        &mut self,
        slot: usize,
        ranges: impl Iterator<Item = Range<usize>>,
        now: Instant,
        out: &mut Out,
    ) {
        let mut actions = std::mem::take(&mut self.actions);
        let route = self.peers[slot].path.route(now, &mut actions);
        for range in ranges {
            self.send_by(slot, Some(route), range, now, out);
        }
        self.act(slot, &mut actions, out);
        self.actions = actions;
    }

    /// Sends to a peer; timers' own datagrams (`route` is `None`) do not count as activity.
    fn send_by(
        &mut self,
        slot: usize,
        route: Option<Route>,
        range: Range<usize>,
        now: Instant,
        out: &mut Out,
    ) {
        let peer = &self.peers[slot];
        let route = route.unwrap_or_else(|| match peer.path.direct(now) {
            Some(address) => Route::Direct(address),
            None => Route::Relay,
        });
        if let Route::Direct(address) | Route::Both(address) = route {
            out.sends.push((To::Address(address), range.clone()));
        }
        if let Route::Relay | Route::Both(_) = route {
            match peer.relay(&self.relays) {
                Some(relay) => out.sends.push((relay, range)),
                None => trace!(peer = %peer.name, "no path and no relay: dropped"),
            }
        }
    }

    /// Carries out what a path asked for.
    fn act(&mut self, slot: usize, actions: &mut Vec<Action>, out: &mut Out) {
        if actions.is_empty() {
            return;
        }
        let peer = &mut self.peers[slot];
        let Some(key) = peer.disco else {
            actions.clear();
            return;
        };
        let relay = peer.relay(&self.relays);
        let pair = peer
            .sealed
            .get_or_insert_with(|| disco::Pair::new(&self.disco, &key));
        for action in actions.drain(..) {
            match (action, relay) {
                (Action::Ping { to, tx_id }, _) => {
                    let ping = disco::Message::Ping {
                        tx_id,
                        node_key: Some(self.node_key),
                    };
                    out.put(To::Address(to), &pair.seal(&ping));
                }
                (Action::CallMeMaybe, Some(relay)) if !self.endpoints.is_empty() => {
                    let call = disco::Message::CallMeMaybe {
                        endpoints: self.endpoints.clone(),
                    };
                    out.put(relay, &pair.seal(&call));
                }
                (Action::CallMeMaybe, _) => {}
                (Action::LookAround, _) => self.lost_a_path = true,
            }
        }
    }

    fn disco(&mut self, datagram: &[u8], from: Origin, now: Instant, out: &mut Out) {
        let Some(sender) = disco::sender(datagram) else {
            return;
        };
        let Some(&slot) = self.by_disco.get(&sender) else {
            trace!(?sender, "disco from nobody we know");
            return;
        };
        let peer = &mut self.peers[slot];
        let pair = peer
            .sealed
            .get_or_insert_with(|| disco::Pair::new(&self.disco, &sender));
        let message = match pair.open(datagram) {
            Ok(message) => message,
            Err(error) => {
                debug!(peer = %peer.name, %error, "ignored a disco message");
                return;
            }
        };
        let mut actions = std::mem::take(&mut self.actions);
        match (message, from) {
            (disco::Message::Ping { tx_id, node_key }, from) => {
                if node_key.is_none_or(|key| key == peer.key) {
                    let (to, src) = match from {
                        Origin::Address(address) => (To::Address(address), address),
                        Origin::Relay(region) => (
                            To::Relay(region, peer.key),
                            SocketAddr::from((DERP_MAGIC_IP, region as u16)),
                        ),
                    };
                    out.put(to, &pair.seal(&disco::Message::Pong { tx_id, src }));
                    if let Origin::Address(address) = from {
                        peer.path.pinged(address, now, &mut actions);
                    }
                }
            }
            (disco::Message::Pong { tx_id, .. }, Origin::Address(_)) => {
                if peer.path.pong(tx_id, now) && peer.retry.is_some() {
                    // The relay may have lost the handshake; this way it arrives.
                    self.retry(slot, now, out);
                }
            }
            (disco::Message::CallMeMaybe { endpoints }, Origin::Relay(_)) => {
                peer.path.called(&endpoints, now, &mut actions);
            }
            // A pong by the relay answers no ping of ours, and a call is only believed from there.
            (disco::Message::Pong { .. } | disco::Message::CallMeMaybe { .. }, _) => {}
            (disco::Message::Other(kind), _) => {
                trace!(kind, "disco message of a kind we do not speak")
            }
        }
        self.act(slot, &mut actions, out);
        self.actions = actions;
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, VecDeque},
        sync::Arc,
    };

    use tailnode_wire::tailcfg::{FilterRule, NetPortRange, PortRange};

    use super::*;

    const REGION: RegionId = 9;

    /// A node on a test network that only carries what its flags allow.
    struct Host {
        keys: Keys,
        router: Router,
        udp: SocketAddr,
        ip: IpAddr,
        received: Vec<Vec<u8>>,
    }

    struct World {
        hosts: Vec<Host>,
        udp_works: bool,
        now: Instant,
        by_udp: usize,
        by_relay: usize,
    }

    fn allow_all() -> Vec<FilterRule> {
        vec![FilterRule {
            src_ips: vec!["*".into()],
            dst_ports: vec![NetPortRange {
                ip: "*".into(),
                ports: PortRange {
                    first: 0,
                    last: 65535,
                },
            }],
            ..FilterRule::default()
        }]
    }

    fn node(id: usize, host: &Keys, ip: IpAddr, udp: SocketAddr) -> tailcfg::Node {
        let mut node = tailcfg::Node::new(id as NodeId, host.node.public);
        node.name = format!("host{id}.example.");
        node.addresses = vec![IpNet::from(ip)];
        node.disco_key = Some(host.disco.public);
        node.endpoints = vec![udp];
        node.home_derp = REGION;
        node
    }

    /// What the node's task does with what the container sends.
    fn on_tun(router: &mut Router, bytes: &[u8], now: Instant, out: &mut Out) -> Taken {
        let Ok(packet) = Packet::parse(bytes) else {
            return Taken::Dropped;
        };
        let taken = router.outbound(&packet, now);
        if let Taken::ForPeer(slot) = taken {
            router.seal(slot, &Burst::whole(bytes), now, out);
        }
        taken
    }

    impl World {
        fn new(udp_works: bool, rules: impl Fn(usize) -> Vec<FilterRule>) -> Self {
            let hosts: Vec<Host> = (1..=2)
                .map(|id: u8| {
                    let keys = Keys::random();
                    let router = Router::new(&keys);
                    let udp = SocketAddr::from(([192, 0, 2, id], 4000));
                    Host {
                        keys,
                        router,
                        udp,
                        ip: IpAddr::from([100, 64, 0, id]),
                        received: Vec::new(),
                    }
                })
                .collect();
            let mut world = Self {
                hosts,
                udp_works,
                now: Instant::now(),
                by_udp: 0,
                by_relay: 0,
            };
            for me in 0..2 {
                world.start(me, rules(me));
            }
            world
        }

        /// Begins with a router that knows its map and nothing else.
        fn start(&mut self, me: usize, rules: Vec<FilterRule>) {
            let peer = 1 - me;
            let netmap = Netmap {
                myself: self.node(me),
                peers: HashMap::from([(peer as NodeId, self.node(peer).into())]),
                filters: BTreeMap::from([("base".to_owned(), rules)]),
                ..Netmap::default()
            };
            let host = &mut self.hosts[me];
            host.router = Router::new(&host.keys);
            host.router
                .update(&netmap, &Changes::everything(), self.now);
            host.router.set_endpoints(vec![host.udp]);
        }

        fn node(&self, id: usize) -> tailcfg::Node {
            let host = &self.hosts[id];
            node(id, &host.keys, host.ip, host.udp)
        }

        fn say(&mut self, from: usize, text: &[u8]) {
            let (src, dst) = (self.hosts[from].ip, self.hosts[1 - from].ip);
            let packet =
                packet::udp(SocketAddr::new(src, 1000), SocketAddr::new(dst, 2000), text).unwrap();
            let mut out = Out::default();
            assert_eq!(
                on_tun(&mut self.hosts[from].router, &packet, self.now, &mut out),
                Taken::ForPeer(0)
            );
            self.carry(from, out);
        }

        /// Carries everything to where it goes until nobody has anything more to say.
        fn carry(&mut self, from: usize, out: Out) {
            let mut queue = VecDeque::from([(from, out)]);
            let mut steps = 0;
            while let Some((from, out)) = queue.pop_front() {
                steps += 1;
                assert!(steps < 1000, "the two talk forever");
                let sender = (self.hosts[from].udp, self.hosts[from].keys.node.public);
                let received = out
                    .tun
                    .iter()
                    .map(|packet| out.bytes[packet.clone()].to_vec());
                self.hosts[from].received.extend(received);
                for (to, bytes, segment) in out.trains(|segment| segment * 64) {
                    let mut answer = Out::default();
                    match to {
                        To::Address(address) => {
                            let Some(at) = self.hosts.iter().position(|h| h.udp == address) else {
                                continue;
                            };
                            if self.udp_works {
                                self.by_udp += bytes.chunks(segment).len();
                                self.hosts[at].router.on_udp(
                                    sender.0,
                                    bytes,
                                    segment,
                                    self.now,
                                    &mut answer,
                                );
                                queue.push_back((at, answer));
                            }
                        }
                        To::Relay(region, key) => {
                            assert_eq!(region, REGION);
                            let at = self
                                .hosts
                                .iter()
                                .position(|h| h.keys.node.public == key)
                                .unwrap();
                            self.by_relay += 1;
                            self.hosts[at].router.on_relay(
                                region,
                                &sender.1,
                                bytes,
                                self.now,
                                &mut answer,
                            );
                            queue.push_back((at, answer));
                        }
                    }
                }
            }
        }

        fn tick(&mut self) {
            for at in 0..self.hosts.len() {
                let mut out = Out::default();
                self.hosts[at].router.tick(self.now, &mut out);
                self.carry(at, out);
            }
        }

        fn heard(&mut self, at: usize) -> Vec<Vec<u8>> {
            let packets = std::mem::take(&mut self.hosts[at].received);
            packets
                .iter()
                .map(|bytes| Packet::parse(bytes).unwrap().payload().to_vec())
                .collect()
        }
    }

    #[test]
    fn the_first_packet_makes_the_session_and_the_path_and_arrives() {
        let mut world = World::new(true, |_| allow_all());
        world.say(0, b"hello");
        assert_eq!(world.heard(1), [b"hello"]);
        world.say(1, b"hello yourself");
        assert_eq!(world.heard(0), [b"hello yourself"]);
        assert!(world.by_relay > 0, "it began by relay");
        let relayed = world.by_relay;
        world.say(0, b"straight");
        assert_eq!(world.heard(1), [b"straight"]);
        assert_eq!(world.by_relay, relayed, "and goes straight now");
        let status = world.hosts[0]
            .router
            .peers(world.now, |id| id.to_string(), |_| false);
        assert_eq!(
            status[0].path,
            PeerPath::Direct {
                address: world.hosts[1].udp
            }
        );
        assert_eq!(status[0].name, "host1.example");
    }

    #[test]
    fn without_udp_everything_goes_by_relay() {
        let mut world = World::new(false, |_| allow_all());
        for _ in 0..5 {
            world.say(0, b"hello");
            world.now += Duration::from_secs(1);
            world.tick();
        }
        assert_eq!(world.heard(1).len(), 5);
        let status = world.hosts[0]
            .router
            .peers(world.now, |id| id.to_string(), |_| false);
        assert_eq!(
            status[0].path,
            PeerPath::Relay {
                region: REGION.to_string()
            }
        );
    }

    #[test]
    fn a_lost_path_is_left_for_the_relay_and_taken_again() {
        let mut world = World::new(true, |_| allow_all());
        world.say(0, b"1");
        world.say(0, b"2");
        world.udp_works = false;
        // Trust ends after some seconds; from then on the relay carries a copy.
        for _ in 0..8 {
            world.now += Duration::from_secs(1);
            world.tick();
        }
        world.heard(1);
        world.say(0, b"3");
        assert_eq!(world.heard(1), [b"3"]);
        world.udp_works = true;
        for _ in 0..8 {
            world.now += Duration::from_secs(1);
            world.tick();
            world.say(0, b"again");
        }
        let relayed = world.by_relay;
        world.say(0, b"4");
        assert_eq!(world.by_relay, relayed);
    }

    #[test]
    fn a_first_packet_to_a_peer_that_is_not_reachable_yet_goes_out_soon_after() {
        let mut world = World::new(false, |_| allow_all());
        // Host 0 does not know yet at which relay host 1 is.
        let everything = Changes {
            peers: vec![1],
            ..Changes::default()
        };
        let mut netmap = Netmap {
            myself: world.node(0),
            peers: HashMap::from([(1, world.node(1).into())]),
            ..Netmap::default()
        };
        Arc::make_mut(netmap.peers.get_mut(&1).unwrap()).home_derp = 0;
        world.hosts[0]
            .router
            .update(&netmap, &everything, world.now);
        world.say(0, b"early");
        assert!(world.heard(1).is_empty());
        world.now += Duration::from_millis(50);
        Arc::make_mut(netmap.peers.get_mut(&1).unwrap()).home_derp = REGION;
        world.hosts[0]
            .router
            .update(&netmap, &everything, world.now);
        world.tick();
        assert_eq!(world.heard(1), [b"early"]);
    }

    #[test]
    fn a_peer_whose_home_cannot_be_used_is_answered_where_it_came_from() {
        let mut world = World::new(false, |_| allow_all());
        let mut netmap = Netmap {
            myself: world.node(0),
            peers: HashMap::from([(1, world.node(1).into())]),
            ..Netmap::default()
        };
        Arc::make_mut(netmap.peers.get_mut(&1).unwrap()).home_derp = REGION + 1;
        let changes = Changes {
            peers: vec![1],
            ..Changes::default()
        };
        let router = &mut world.hosts[0].router;
        router.set_relays([REGION].into());
        router.update(&netmap, &changes, world.now);
        world.say(1, b"hello");
        world.say(0, b"hello yourself");
        assert_eq!(world.heard(1), [b"hello yourself"]);
    }

    #[test]
    fn one_way_policy_lets_answers_back_and_nothing_else() {
        // Host 1 lets host 0 in; host 0 lets nobody in.
        let mut world = World::new(true, |me| if me == 1 { allow_all() } else { Vec::new() });
        world.say(1, b"unasked");
        assert!(world.heard(0).is_empty());
        // The same addresses and ports the other way round, as an answer has them.
        let (a, b) = (
            SocketAddr::new(world.hosts[0].ip, 7),
            SocketAddr::new(world.hosts[1].ip, 8),
        );
        for (from, src, dst) in [(0, a, b), (1, b, a)] {
            let packet = packet::udp(src, dst, b"asked").unwrap();
            let mut out = Out::default();
            on_tun(&mut world.hosts[from].router, &packet, world.now, &mut out);
            world.carry(from, out);
        }
        assert_eq!(world.heard(0), [b"asked"]);
    }

    #[test]
    fn a_peer_cannot_send_as_another() {
        let mut world = World::new(true, |_| allow_all());
        world.say(0, b"hello");
        world.heard(1);
        // Host 1 is told that host 0 has another address: what it sends from the old one is dropped.
        let mut peer = world.node(0);
        peer.addresses = vec!["100.64.0.77/32".parse().unwrap()];
        let netmap = Netmap {
            myself: world.node(1),
            peers: HashMap::from([(0, peer.into())]),
            filters: BTreeMap::from([("base".to_owned(), allow_all())]),
            ..Netmap::default()
        };
        let changes = Changes {
            peers: vec![0],
            ..Changes::default()
        };
        world.hosts[1].router.update(&netmap, &changes, world.now);
        world.say(0, b"spoofed");
        assert!(world.heard(1).is_empty());
    }

    #[test]
    fn a_removed_peer_is_no_longer_heard() {
        let mut world = World::new(true, |_| allow_all());
        world.say(0, b"hello");
        world.heard(1);
        let changes = Changes {
            peers: vec![0],
            ..Changes::default()
        };
        world.hosts[1]
            .router
            .update(&Netmap::default(), &changes, world.now);
        world.say(0, b"still there?");
        assert!(world.heard(1).is_empty());
        assert!(
            world.hosts[1]
                .router
                .peers(world.now, |_| String::new(), |_| false)
                .is_empty()
        );
    }

    /// Tells host 1 that its peers are now these.
    fn tell(world: &mut World, peers: &[(NodeId, tailcfg::Node)], changed: &[NodeId]) {
        let netmap = Netmap {
            myself: world.node(1),
            peers: peers
                .iter()
                .cloned()
                .map(|(id, peer)| (id, peer.into()))
                .collect(),
            filters: BTreeMap::from([("base".to_owned(), allow_all())]),
            ..Netmap::default()
        };
        let changes = Changes {
            peers: changed.to_vec(),
            ..Changes::default()
        };
        world.hosts[1].router.update(&netmap, &changes, world.now);
    }

    #[test]
    fn a_peer_that_comes_again_under_a_new_number_stays_when_the_old_one_goes() {
        let mut world = World::new(true, |_| allow_all());
        let (old, mut new) = (world.node(0), world.node(0));
        new.id = 7;
        tell(&mut world, &[(0, old), (7, new.clone())], &[7]);
        tell(&mut world, &[(7, new)], &[0]);
        world.say(0, b"hello");
        assert_eq!(world.heard(1), [b"hello"]);
        world.say(0, b"straight");
        assert_eq!(world.heard(1), [b"straight"]);
        let router = &world.hosts[1].router;
        assert!(
            router.peers[router.by_id[&7]]
                .path
                .direct(world.now)
                .is_some()
        );
    }

    #[test]
    fn who_called_before_the_map_named_it_is_called_back() {
        for udp_works in [true, false] {
            let mut world = World::new(udp_works, |_| allow_all());
            let peer = world.node(0);
            tell(&mut world, &[], &[0]);
            world.say(0, b"hello");
            assert!(world.heard(1).is_empty());
            tell(&mut world, &[(0, peer)], &[0]);
            world.tick();
            assert_eq!(world.heard(1), [b"hello"]);
        }
    }

    #[test]
    fn who_was_restarted_calls_those_that_have_not_heard_of_it() {
        for udp_works in [true, false] {
            let mut world = World::new(udp_works, |_| allow_all());
            world.say(0, b"hello");
            world.say(1, b"hello");
            world.heard(1);
            world.now += Duration::from_secs(1);
            world.start(1, allow_all());
            world.say(0, b"lost");
            assert!(world.heard(1).is_empty());
            world.say(0, b"and on");
            assert_eq!(world.heard(1), [b"and on"]);
            // Who only pretends to be the peer makes us call it, once.
            let mut stale = vec![4, 0, 0, 0];
            stale.resize(100, 7);
            let mut out = Out::default();
            let (address, now) = (world.hosts[0].udp, world.now + CALL_BACK_EVERY);
            world.hosts[1]
                .router
                .on_udp(address, &stale, 100, now, &mut out);
            assert!(out.is_empty(), "we have a session");
        }
    }

    #[test]
    fn strangers_make_no_tunnels() {
        let mut world = World::new(true, |_| allow_all());
        let from = SocketAddr::from(([192, 0, 2, 99], 4000));
        for (kind, length) in [(2u8, 92), (3, 64), (4, 100)] {
            let mut datagram = vec![0; length];
            datagram[0] = kind;
            let router = &mut world.hosts[1].router;
            router.on_udp(
                from,
                &datagram,
                datagram.len(),
                world.now,
                &mut Out::default(),
            );
            assert!(router.peers.iter().all(|(_, peer)| peer.tunnel.is_none()));
        }
    }

    #[test]
    fn what_waits_for_a_handshake_goes_when_the_peers_own_has_ended() {
        for gave_up in [false, true] {
            let mut world = World::new(false, |_| allow_all());
            let packet = |world: &World, from: usize| {
                let (src, dst) = (world.hosts[from].ip, world.hosts[1 - from].ip);
                packet::udp(SocketAddr::new(src, 1), SocketAddr::new(dst, 2), b"hi").unwrap()
            };
            let relayed = |world: &mut World, to: usize, out: &Out| {
                let from = world.hosts[1 - to].keys.node.public;
                let mut answer = Out::default();
                for (way, bytes, _) in out.trains(|_| 0) {
                    if matches!(way, To::Relay(..)) {
                        let router = &mut world.hosts[to].router;
                        router.on_relay(REGION, &from, bytes, world.now, &mut answer);
                    }
                }
                answer
            };
            let (mut begin, mut lost) = (Out::default(), Out::default());
            let first = packet(&world, 0);
            on_tun(&mut world.hosts[0].router, &first, world.now, &mut begin);
            let response = relayed(&mut world, 1, &begin);
            // Host 1 has answered, and does not know yet that host 0 has heard it.
            let second = packet(&world, 1);
            on_tun(&mut world.hosts[1].router, &second, world.now, &mut lost);
            if gave_up {
                world.hosts[1].router.peers[0].retry = None;
            }
            let confirmed = relayed(&mut world, 0, &response);
            let waited = relayed(&mut world, 1, &confirmed);
            let heard = relayed(&mut world, 0, &waited);
            assert_eq!((waited.tun.len(), heard.tun.len()), (1, 1));
        }
    }

    #[test]
    fn pings_between_nodes_are_answered_whatever_policy_says() {
        let mut world = World::new(true, |_| Vec::new());
        let (a, b) = (world.hosts[0].ip, world.hosts[1].ip);
        let ping = |src, dst| packet::tests::raw(src, dst, protocol::TSMP, b"p12345678");
        let from_container = ping(a, b);
        let router = &mut world.hosts[0].router;
        let taken = on_tun(router, &from_container, world.now, &mut Out::default());
        assert_eq!(
            taken,
            Taken::Dropped,
            "containers do not speak for their node"
        );
        // A session, so that what is sealed leaves at once.
        world.say(0, b"hello");
        world.say(0, b"hello");
        for (dst, answers) in [(b, 1), (IpAddr::from([100, 64, 0, 9]), 0)] {
            let mut out = Out::default();
            let slot = world.hosts[0].router.by_id[&1];
            let router = &mut world.hosts[0].router;
            router.seal(slot, &Burst::whole(&ping(a, dst)), world.now, &mut out);
            let (mut pongs, key) = (Out::default(), world.hosts[0].keys.node.public);
            let from = world.hosts[0].udp;
            for (to, bytes, _) in out.trains(|_| 0) {
                let router = &mut world.hosts[1].router;
                match to {
                    To::Relay(..) => router.on_relay(REGION, &key, bytes, world.now, &mut pongs),
                    _ => router.on_udp(from, bytes, bytes.len(), world.now, &mut pongs),
                }
            }
            assert_eq!(pongs.sends.len(), answers);
            world.carry(1, pongs);
        }
        assert!(world.heard(0).is_empty() && world.heard(1).is_empty());
    }

    #[test]
    fn one_jailed_peer_does_not_raise_the_shields_for_others() {
        let mut world = World::new(true, |_| allow_all());
        let (mut jailed, mut free) = (world.node(0), world.node(0));
        jailed.is_jailed = true;
        free.id = 7;
        free.key = Keys::random().node.public;
        free.disco_key = None;
        let other = IpAddr::from([100, 64, 0, 7]);
        free.addresses = vec![IpNet::from(other)];
        let (jailed_key, free_key) = (jailed.key, free.key);
        tell(&mut world, &[(0, jailed), (7, free)], &[0, 7]);
        world.say(0, b"hello");
        assert!(world.heard(1).is_empty());
        let us = world.hosts[1].ip;
        for (src, enters) in [(other, true), (world.hosts[0].ip, false), (other, true)] {
            let from = SocketAddr::new(src, 5);
            let bytes = packet::udp(from, SocketAddr::new(us, 6), b"").unwrap();
            let packet = Packet::parse(&bytes).unwrap();
            let router = &mut world.hosts[1].router;
            let key = if src == other { free_key } else { jailed_key };
            assert_eq!(router.enter(&key, &packet, world.now), enters);
        }
    }

    #[test]
    fn queries_go_to_the_resolver_unless_a_peer_is_asked() {
        let mut world = World::new(true, |_| allow_all());
        let me = SocketAddr::new(world.hosts[0].ip, 5000);
        let mut ask = |server: &str| {
            let packet = packet::udp(me, server.parse().unwrap(), b"?").unwrap();
            on_tun(
                &mut world.hosts[0].router,
                &packet,
                Instant::now(),
                &mut Out::default(),
            )
        };
        assert_eq!(ask("100.100.100.100:53"), Taken::ForResolver);
        assert_eq!(ask("100.100.100.100:80"), Taken::ForResolver);
        assert_eq!(ask("9.9.9.9:53"), Taken::ForResolver);
        assert_eq!(ask("9.9.9.9:54"), Taken::Dropped);
        assert_eq!(ask("100.64.0.2:53"), Taken::ForPeer(0));
    }

    #[test]
    fn two_routers_of_one_subnet_relieve_each_other() {
        let mut world = World::new(true, |_| allow_all());
        world.hosts[1].router.prefer(Preferences {
            accept: true,
            ..Preferences::default()
        });
        let subnets = |nets: &[&str]| {
            let nets = nets.iter().map(|net| net.parse().unwrap());
            nets.collect::<Vec<IpNet>>()
        };
        let routing = |id, ip: &str, nets: &[&str]| {
            let mut node = tailcfg::Node::new(id, Keys::random().node.public);
            node.addresses = subnets(&[ip]);
            node.allowed_ips = Some([node.addresses.clone(), subnets(nets)].concat());
            node
        };
        let way = |world: &World, ip: [u8; 4]| {
            let router = &world.hosts[1].router;
            let slot = router.routes.lookup(ip.into());
            slot.map(|&slot| router.peers[slot].id)
        };
        let wide = routing(7, "100.64.0.7/32", &["10.0.0.0/8", "10.0.0.0/24"]);
        let narrow = routing(8, "100.64.0.8/32", &["10.0.0.0/24"]);
        tell(
            &mut world,
            &[(7, wide.clone()), (8, narrow.clone())],
            &[7, 8],
        );
        assert_eq!(way(&world, [10, 9, 9, 9]), Some(7));
        assert_eq!(way(&world, [10, 0, 0, 9]), Some(8));
        // The second loses the subnet, and the first still has it.
        let without = routing(8, "100.64.0.8/32", &[]);
        let without = tailcfg::Node {
            key: narrow.key,
            ..without
        };
        tell(&mut world, &[(7, wide.clone()), (8, without)], &[8]);
        assert_eq!(way(&world, [10, 0, 0, 9]), Some(7));
        tell(&mut world, &[(7, wide), (8, narrow.clone())], &[8]);
        tell(&mut world, &[(8, narrow)], &[7]);
        assert_eq!(way(&world, [10, 9, 9, 9]), None);
        assert_eq!(way(&world, [10, 0, 0, 9]), Some(8));
    }

    #[test]
    fn an_exit_takes_everything_but_questions_of_the_engine() {
        let mut world = World::new(true, |_| allow_all());
        let mut exit = world.node(0);
        exit.allowed_ips = Some([&*exit.addresses, &crate::routes::EVERYWHERE].concat());
        let us = world.hosts[1].ip;
        let mut taken = |exit_node, to: &str| {
            let preferences = Preferences {
                exit_node,
                ..Preferences::default()
            };
            world.hosts[1].router.prefer(preferences);
            tell(&mut world, &[(0, exit.clone())], &[0]);
            let packet = packet::udp(SocketAddr::new(us, 5000), to.parse().unwrap(), b"").unwrap();
            let packet = Packet::parse(&packet).unwrap();
            let router = &mut world.hosts[1].router;
            router.outbound(&packet, world.now)
        };
        let named = || Some(crate::routes::ExitNode::Name("host0.example".into()));
        assert_eq!(taken(None, "192.0.2.1:80"), Taken::Dropped);
        assert_eq!(taken(named(), "192.0.2.1:80"), Taken::ForPeer(0));
        assert_eq!(taken(named(), "192.0.2.1:53"), Taken::ForResolver);
        assert_eq!(taken(named(), "100.64.0.1:53"), Taken::ForPeer(0));
        world.hosts[1].router.take_queries(false);
        let mut taken = |to: &str| {
            let packet = packet::udp(SocketAddr::new(us, 5000), to.parse().unwrap(), b"").unwrap();
            let packet = Packet::parse(&packet).unwrap();
            world.hosts[1].router.outbound(&packet, world.now)
        };
        assert_eq!(taken("192.0.2.1:53"), Taken::ForPeer(0));
        assert_eq!(taken("100.100.100.100:53"), Taken::ForResolver);
        // The resolver's own questions leave by the exit.
        let router = &mut world.hosts[1].router;
        let server = "192.0.2.1:53".parse().unwrap();
        let question = packet::udp(SocketAddr::new(us, 5000), server, b"").unwrap();
        let question = Packet::parse(&question).unwrap();
        assert_eq!(router.question(&question, world.now), Taken::ForPeer(0));
    }

    #[test]
    fn neighbours_bring_what_a_tunnel_would_and_no_more() {
        let mut world = World::new(true, |_| allow_all());
        world.hosts[1].router.prefer(Preferences {
            accept: true,
            advertise: vec!["10.2.0.0/24".parse().unwrap()],
            ..Preferences::default()
        });
        let mut gateway = world.node(0);
        let behind = "10.1.0.0/24".parse().unwrap();
        gateway.allowed_ips = Some([&*gateway.addresses, &[behind]].concat());
        let key = gateway.key;
        let netmap = Netmap {
            myself: world.node(1),
            peers: [(0, gateway.into())].into(),
            filters: BTreeMap::from([("base".to_owned(), allow_all())]),
            ..Netmap::default()
        };
        let (peer, us) = (world.hosts[0].ip, world.hosts[1].ip);
        let router = &mut world.hosts[1].router;
        router.update(&netmap, &Changes::everything(), world.now);
        let mut enters = |key: &NodePublicKey, src: IpAddr, dst: IpAddr| {
            let (from, to) = (SocketAddr::new(src, 5), SocketAddr::new(dst, 6));
            let bytes = packet::udp(from, to, b"").unwrap();
            router.enter(key, &Packet::parse(&bytes).unwrap(), world.now)
        };
        let [theirs, ours, nobodys] = [1, 2, 3].map(|net| IpAddr::from([10, net, 0, 9]));
        for (src, dst, expected) in [
            (peer, us, true),
            (theirs, us, true),
            (theirs, ours, true),
            (ours, us, false),
            (nobodys, us, false),
            (peer, theirs, false),
            (peer, nobodys, false),
        ] {
            assert_eq!(enters(&key, src, dst), expected, "{src} to {dst}");
        }
        assert!(!enters(&Keys::random().node.public, theirs, us));
    }

    #[test]
    fn runs_of_equal_datagrams_are_one_train() {
        let address = To::Address("192.0.2.1:1".parse().unwrap());
        let other = To::Address("192.0.2.2:1".parse().unwrap());
        let mut out = Out::default();
        for (to, size) in [
            (address, 10),
            (address, 10),
            (address, 4),
            (address, 10),
            (other, 10),
        ] {
            out.put(to, &vec![7; size]);
        }
        let sizes = |room: usize| -> Vec<(To, usize, usize)> {
            out.trains(|_| room)
                .map(|(to, bytes, segment)| (to, bytes.len(), segment))
                .collect()
        };
        assert_eq!(
            sizes(1000),
            [(address, 24, 10), (address, 10, 10), (other, 10, 10),]
        );
        assert_eq!(sizes(20)[..2], [(address, 20, 10), (address, 4, 4)]);
    }

    mod hostile {
        use proptest::prelude::*;

        use super::*;

        proptest! {
            #[test]
            fn no_bytes_panic(bytes: Vec<u8>, kind in 0u8..5) {
                let mut world = World::new(true, |_| allow_all());
                let mut bytes = bytes;
                if let Some(first) = bytes.first_mut() {
                    *first = kind;
                }
                let mut out = Out::default();
                let key = world.hosts[1].keys.node.public;
                let from = world.hosts[1].udp;
                let router = &mut world.hosts[0].router;
                on_tun(router, &bytes, world.now, &mut out);
                router.on_udp(from, &bytes, bytes.len(), world.now, &mut out);
                router.on_relay(REGION, &key, &bytes, world.now, &mut out);
            }
        }
    }
}
