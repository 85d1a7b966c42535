//! What is left of a node that owes nothing: one peer, one key for ever, and no handshake, replay
//! window, lookup, filter, path or clock. It is made of the node's own parts (device, bursts, socket),
//! so the distance from here to the node is what the rest of the node costs.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use tailnode_node::{
    Offload,
    bench::{Batch, Burst, Device, Joiner, PACKET_ROOM, Udp},
};
use tailnode_tun::Netns;
use tokio::runtime;

/// Its device in the container.
pub const DEVICE: &str = "floor0";
const PORT: u16 = 51820;
/// Before a sealed packet, as in WireGuard's data message: type, receiver and counter.
const HEAD: usize = 16;
/// Receptions from one source before the others have their turn.
const TURN: usize = 64;

/// Carries packets between the container whose namespace is at this path and the same program at the
/// other address. It ends by a signal.
pub fn run(container: &str, other: &str) {
    let other: IpAddr = other.parse().expect("an address");
    let prefix = DEVICE.trim_end_matches('0');
    let tun = tailnode_tun::create(prefix).expect("make the device");
    let netns = Netns::open(container).expect("the container's namespace");
    let device = tailnode_tun::move_into(prefix, &netns, prefix).expect("move the device");
    assert_eq!(device, DEVICE);
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_io()
        .build();
    runtime.expect("the runtime").block_on(async {
        let device = Device::new(tun, Offload::All).expect("use the device");
        let udp = Udp::open(PORT, true).expect("open the socket");
        let (device, udp) = (Arc::new(device), Arc::new(udp));
        let sealing = tokio::spawn(seal(device.clone(), udp.clone(), (other, PORT).into()));
        let opening = tokio::spawn(open(device, udp));
        sealing.await.expect("seal");
        opening.await.expect("open");
    });
}

async fn seal(device: Arc<Device>, udp: Arc<Udp>, to: SocketAddr) {
    let (key, mut counter) = (key(), 0_u64);
    let (mut room, mut scratch, mut train) = (vec![0; PACKET_ROOM], Vec::new(), Vec::new());
    loop {
        device.readable().await.expect("the device");
        for _ in 0..TURN {
            let Some((header, bytes)) = device.receive(&mut room).expect("the device") else {
                break;
            };
            let burst = Burst::new(header, bytes).expect("the kernel's own packet");
            train.clear();
            let mut each = 0;
            burst.packets(&mut scratch, |packet| {
                let start = train.len();
                train.extend_from_slice(&[4, 0, 0, 0, 0, 0, 0, 0]);
                train.extend_from_slice(&counter.to_le_bytes());
                train.extend_from_slice(packet);
                let tag = key
                    .seal_in_place_separate_tag(
                        nonce(counter),
                        Aad::empty(),
                        &mut train[start + HEAD..],
                    )
                    .expect("seal");
                train.extend_from_slice(tag.as_ref());
                counter += 1;
                // All but the last are as long as the first.
                each = each.max(train.len() - start);
            });
            for part in train.chunks(udp.train(each)) {
                udp.send(to, part, each).expect("send");
            }
        }
        tokio::task::yield_now().await;
    }
}

async fn open(device: Arc<Device>, udp: Arc<Udp>) {
    let key = key();
    let (mut batch, mut joiner) = (Batch::default(), Joiner::default());
    let (mut bytes, mut packets) = (Vec::new(), Vec::new());
    loop {
        udp.readable().await.expect("the socket");
        for _ in 0..TURN {
            let Ok(more) = udp.receive(&mut batch) else {
                break;
            };
            for (_, train, each) in batch.trains() {
                for datagram in train.chunks(each) {
                    let Some((head, sealed)) = datagram.split_first_chunk::<HEAD>() else {
                        continue;
                    };
                    let [.., a, b, c, d, e, f, g, h] = *head;
                    let counter = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
                    let start = bytes.len();
                    bytes.extend_from_slice(sealed);
                    let opened = key
                        .open_in_place(nonce(counter), Aad::empty(), &mut bytes[start..])
                        .expect("a datagram of the other's");
                    let end = start + opened.len();
                    bytes.truncate(end);
                    packets.push(start..end);
                }
            }
            let handed = device.send_all(&mut bytes, &mut packets, &mut joiner);
            handed.expect("the device");
            bytes.clear();
            if !more {
                break;
            }
        }
        tokio::task::yield_now().await;
    }
}

/// The same in both directions: nonces repeat, and this protects nothing.
fn key() -> LessSafeKey {
    let key = UnboundKey::new(&CHACHA20_POLY1305, &[7; 32]);
    LessSafeKey::new(key.expect("a key"))
}

fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}
