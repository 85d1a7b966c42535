//! The parts of a packet's way by themselves: `cargo bench -p tailnode-bench --bench parts`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a bench reports by panicking, and is not called by anyone"
)]

use std::{
    collections::{BTreeMap, VecDeque},
    hint::black_box,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Instant,
};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use ipnet::IpNet;
use tailnode_node::bench::{
    Burst, Changes, Filter, Header, Joiner, Keys, Netmap, Out, Packet, Router, Taken, To, Verdict,
};
use tailnode_wire::tailcfg::{
    FilterRule, MapResponse, NetPortRange, Node, NodeId, PeerChange, PortRange,
};
use ts_bart::RoutingTable;

const MTU: usize = 1280;
const IPV4: usize = 20;
const TCP: usize = 20;
/// Packets of a full burst: as many as fit into 64 KiB.
const BURST: usize = 64 * 1024 / MTU;
const PEERS: u32 = 10_000;
const RULES: u8 = 20;

const NEAR: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 1);
const FAR: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 2);

criterion_group!(benches, bursts, session, policy, map);
criterion_main!(benches);

/// Cutting what the container sends, and joining what it receives.
fn bursts(c: &mut Criterion) {
    let mut group = c.benchmark_group("burst");
    group.throughput(Throughput::Bytes((BURST * MTU) as u64));
    let (header, mut whole) = burst();
    let mut scratch = Vec::new();
    group.bench_function("split", |b| {
        b.iter(|| {
            let burst = Burst::new(header, &mut whole).unwrap();
            burst.packets(&mut scratch, |packet| {
                black_box(packet);
            });
        })
    });
    let packets = cut();
    let mut joiner = Joiner::default();
    group.bench_function("join", |b| {
        b.iter_batched_ref(
            || packets.concat(),
            |bytes| {
                for number in 0..BURST {
                    joiner.push(bytes, number * MTU..(number + 1) * MTU, true);
                }
                let mut bursts = 0;
                joiner
                    .drain(bytes, |_, _, parts| {
                        bursts += 1;
                        black_box(parts);
                        Ok::<_, ()>(())
                    })
                    .unwrap();
                assert_eq!(bursts, 1);
            },
            BatchSize::LargeInput,
        )
    });
}

/// Sealing a burst and opening it, with all that a node does for it between device and socket.
fn session(c: &mut Criterion) {
    let mut group = c.benchmark_group("session");
    group.throughput(Throughput::Bytes((BURST * MTU) as u64));
    let (mut near, mut far) = pair();
    let (header, mut whole) = burst();
    let (from, to) = (near.address, far.address);
    let now = Instant::now();
    let mut out = Out::default();
    group.bench_function("seal", |b| {
        b.iter(|| {
            out.clear();
            near.send(header, &mut whole, now, &mut out);
            assert!(out.len() > BURST * MTU);
        })
    });
    group.bench_function("open", |b| {
        b.iter_batched(
            || {
                let mut sealed = Out::default();
                near.send(header, &mut whole, now, &mut sealed);
                sealed
            },
            |sealed| {
                out.clear();
                for (way, train, each) in sealed.trains(|each| each * 64) {
                    assert_eq!(way, To::Address(to));
                    far.router.on_udp(from, train, each, now, &mut out);
                }
                let (bytes, packets) = out.for_container();
                assert_eq!(packets.len(), BURST);
                black_box(bytes);
            },
            BatchSize::LargeInput,
        )
    });
}

/// The filter on a flow that goes on, and on packets that the last of many rules lets in; and the
/// lookup of a peer among many.
fn policy(c: &mut Criterion) {
    let mut filter = Filter::default();
    filter.set_local(&[IpNet::from(IpAddr::from(FAR))]);
    let rules: Vec<FilterRule> = (0..RULES)
        .map(|number| allow(&format!("100.64.0.{number}/32")))
        .chain([allow(&NEAR.to_string())])
        .collect();
    filter.set_rules(&rules, |_| Vec::new());
    let packets = cut();
    let packet = Packet::parse(&packets[0]).unwrap();
    let now = Instant::now();
    let mut group = c.benchmark_group("filter");
    group.bench_function("inbound", |b| {
        b.iter(|| assert_eq!(filter.inbound(black_box(&packet), now), Verdict::Accept))
    });
    let answer = tcp(FAR, NEAR, &[0; 100]);
    let answer = Packet::parse(&answer).unwrap();
    group.bench_function("outbound", |b| {
        b.iter(|| assert_eq!(filter.outbound(black_box(&answer), now), Verdict::Accept))
    });
    group.finish();

    let mut table = ts_bart::Table::<u32>::default();
    for number in 0..PEERS {
        table.insert(address(number).into(), number);
    }
    let mut number = 0;
    c.bench_function("lookup/10000", |b| {
        b.iter(|| {
            number = (number + 7919) % PEERS;
            assert_eq!(table.lookup(address(number)), Some(&number));
        })
    });
}

/// One change of one peer among ten thousand, from the message to the router.
fn map(c: &mut Criterion) {
    let mut netmap = Netmap::default();
    let mut router = Router::new(&Keys::random());
    let first = MapResponse {
        node: Some(node(0, &Keys::random())),
        peers: Some((1..=PEERS).map(|id| node(id, &Keys::random())).collect()),
        ..MapResponse::default()
    };
    let now = Instant::now();
    let changes = netmap.restart(first, chrono::Utc::now());
    router.update(&netmap, &changes, now);
    let mut port = 1;
    c.bench_function("map/patch", |b| {
        b.iter_batched(
            || {
                port = port % 60_000 + 1;
                MapResponse {
                    peers_changed_patch: vec![PeerChange {
                        node_id: 77,
                        endpoints: Some(vec![([192, 0, 2, 1], port).into()]),
                        ..PeerChange::default()
                    }],
                    ..MapResponse::default()
                }
            },
            |message| {
                let changes = netmap.apply(message, chrono::Utc::now());
                assert_eq!(changes.peers, [77]);
                router.update(&netmap, &changes, now);
            },
            BatchSize::SmallInput,
        )
    });
}

/// A node and where it can be reached.
struct Side {
    router: Router,
    keys: Keys,
    address: SocketAddr,
}

impl Side {
    fn new(id: u8) -> Side {
        let keys = Keys::random();
        Side {
            router: Router::new(&keys),
            keys,
            address: ([192, 0, 2, id], 4000).into(),
        }
    }

    fn meet(&mut self, me: Node, peer: Node) {
        let netmap = Netmap {
            myself: me,
            peers: [(peer.id, peer.into())].into(),
            filters: BTreeMap::from([("base".to_owned(), vec![allow("*")])]),
            ..Netmap::default()
        };
        let now = Instant::now();
        self.router.update(&netmap, &Changes::everything(), now);
        self.router.set_endpoints(vec![self.address]);
    }

    /// What the node's task does with what its container sends.
    fn send(&mut self, header: Header, bytes: &mut [u8], now: Instant, out: &mut Out) {
        let burst = Burst::new(header, bytes).unwrap();
        let packet = Packet::parse(burst.bytes()).unwrap();
        let Taken::ForPeer(slot) = self.router.outbound(&packet, now) else {
            panic!("the packet leads nowhere");
        };
        self.router.seal(slot, &burst, now, out);
    }
}

/// Two nodes that have a session and a direct path.
fn pair() -> (Side, Side) {
    let (mut near, mut far) = (Side::new(1), Side::new(2));
    let node = |side: &Side, id: u8| {
        let mut node = node(u32::from(id), &side.keys);
        node.addresses = vec![IpNet::from(IpAddr::from([100, 64, 0, id]))];
        node.endpoints = vec![side.address];
        node
    };
    let (near_node, far_node) = (node(&near, 1), node(&far, 2));
    near.meet(near_node.clone(), far_node.clone());
    far.meet(far_node, near_node);
    let now = Instant::now();
    let mut first = Out::default();
    let mut hello = tcp(NEAR, FAR, b"hello");
    near.send(Header::default(), &mut hello, now, &mut first);
    let mut on_the_way = VecDeque::from([(true, first)]);
    while let Some((from_near, out)) = on_the_way.pop_front() {
        let (from, to) = if from_near {
            (&near, &mut far)
        } else {
            (&far, &mut near)
        };
        let mut answer = Out::default();
        for (way, bytes, each) in out.trains(|each| each * 64) {
            match way {
                To::Address(_) => to
                    .router
                    .on_udp(from.address, bytes, each, now, &mut answer),
                To::Relay(region, _) => {
                    let key = &from.keys.node.public;
                    to.router.on_relay(region, key, bytes, now, &mut answer);
                }
            }
        }
        if !answer.is_empty() {
            on_the_way.push_back((!from_near, answer));
        }
    }
    (near, far)
}

fn node(id: u32, keys: &Keys) -> Node {
    let mut node = Node::new(NodeId::from(id), keys.node.public);
    node.name = format!("node{id}.bench.internal.");
    node.addresses = vec![address(id).into()];
    node.disco_key = Some(keys.disco.public);
    node.home_derp = 1;
    node
}

fn address(number: u32) -> IpAddr {
    Ipv4Addr::from_bits(NEAR.to_bits() + number).into()
}

fn allow(source: &str) -> FilterRule {
    FilterRule {
        src_ips: vec![source.to_owned()],
        dst_ports: vec![NetPortRange {
            ip: "*".to_owned(),
            ports: PortRange {
                first: 0,
                last: 65535,
            },
        }],
        ..FilterRule::default()
    }
}

/// What the container sends at once, as the kernel hands it over: headers, and the payload of many
/// packets.
fn burst() -> (Header, Vec<u8>) {
    const GSO_TCPV4: u8 = 1;
    const NEEDS_CSUM: u8 = 1;
    const CHECKSUM_AT: u16 = 16;
    let payload = MTU - IPV4 - TCP;
    let bytes = tcp(NEAR, FAR, &vec![0x5a; payload * BURST]);
    let mut header = [NEEDS_CSUM, GSO_TCPV4, 0, 0, 0, 0, 0, 0, 0, 0];
    let numbers = [
        (IPV4 + TCP) as u16,
        payload as u16,
        IPV4 as u16,
        CHECKSUM_AT,
    ];
    for (place, number) in header[2..].chunks_mut(2).zip(numbers) {
        place.copy_from_slice(&number.to_ne_bytes());
    }
    (Header::from_bytes(header), bytes)
}

/// The same, cut.
fn cut() -> Vec<Vec<u8>> {
    let (header, mut bytes) = burst();
    let mut packets = Vec::new();
    let burst = Burst::new(header, &mut bytes).unwrap();
    burst.packets(&mut Vec::new(), |packet| packets.push(packet.to_vec()));
    assert_eq!(packets.len(), BURST);
    packets
}

/// A segment without checksums: as the kernel leaves them to the device.
fn tcp(from: Ipv4Addr, to: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    const ACK: u8 = 0x10;
    let length = (IPV4 + TCP + payload.len()) as u16;
    let [high, low] = length.to_be_bytes();
    let mut bytes = vec![0x45, 0, high, low, 0, 0, 0x40, 0, 64, 6, 0, 0];
    bytes.extend(from.octets());
    bytes.extend(to.octets());
    bytes.extend([0x0f, 0xa0, 0x1f, 0x40]); // from port 4000 to 8000
    bytes.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, ACK, 0xff, 0xff, 0, 0, 0, 0]);
    bytes.extend(payload);
    bytes
}
