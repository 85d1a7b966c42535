//! The nodes of one process: what passes between two of them needs no tunnel.

use std::{
    collections::HashMap,
    fmt, iter,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use tailnode_wire::keys::NodePublicKey;
use tracing::trace;

use crate::{device::Device, dns, netmap::Known, offload::Burst, packet::Packet, router::Router};

/// Nodes that find each other by their keys, and share what they know of their peers. Cheap to clone;
/// all clones are the same.
#[derive(Clone, Default)]
pub struct Neighbours {
    doors: Arc<RwLock<HashMap<NodePublicKey, Weak<Door>>>>,
    pub(crate) known: Known,
}

impl fmt::Debug for Neighbours {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Neighbours").finish_non_exhaustive()
    }
}

/// Where packets come into a node's container: from its own task, and from its neighbours'.
///
/// Nobody holds the router of two nodes at once.
pub(crate) struct Door {
    pub device: Device,
    router: Mutex<Router>,
    /// Takes what answers the resolver's own questions.
    answers: dns::Peers,
    /// Bytes that neighbours brought.
    rx_bytes: AtomicU64,
}

/// A node among its neighbours; leaving is dropping it.
pub(crate) struct Presence {
    neighbours: Neighbours,
    key: NodePublicKey,
    door: Weak<Door>,
}

impl Neighbours {
    pub(crate) fn enter(&self, key: NodePublicKey, door: &Arc<Door>) -> Presence {
        let door = Arc::downgrade(door);
        self.write(|nodes| nodes.insert(key, door.clone()));
        Presence {
            neighbours: self.clone(),
            key,
            door,
        }
    }

    /// The node that has this key, if it is one of ours.
    pub(crate) fn find(&self, key: &NodePublicKey) -> Option<Arc<Door>> {
        let nodes = self.doors.read().unwrap_or_else(PoisonError::into_inner);
        nodes.get(key).and_then(Weak::upgrade)
    }

    fn write<T>(&self, change: impl FnOnce(&mut HashMap<NodePublicKey, Weak<Door>>) -> T) -> T {
        // A panic elsewhere leaves the map whole: each change is one insertion or removal.
        change(&mut self.doors.write().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.neighbours.write(|nodes| {
            // With the same key, its successor may be there already.
            if nodes
                .get(&self.key)
                .is_some_and(|door| door.ptr_eq(&self.door))
            {
                nodes.remove(&self.key);
            }
        });
    }
}

impl Door {
    pub fn new(device: Device, router: Router, answers: dns::Peers) -> Self {
        Self {
            device,
            router: Mutex::new(router),
            answers,
            rx_bytes: AtomicU64::new(0),
        }
    }

    pub fn router(&self) -> MutexGuard<'_, Router> {
        // What a panic may have left half done is one packet.
        self.router.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of IP packets that neighbours brought.
    pub fn rx_bytes(&self) -> u64 {
        self.rx_bytes.load(Ordering::Relaxed)
    }

    /// Strikes out those packets in `bytes` that answer the resolver's questions: they are not for
    /// the container.
    pub fn keep_for_container(&self, bytes: &[u8], packets: &mut Vec<Range<usize>>) {
        packets.retain(|packet| !self.answers.take(&bytes[packet.clone()]));
    }

    /// Takes what the neighbour with the key `from` sends, if this node's policy lets it in.
    /// `packet` is what the burst is judged as.
    pub fn take(&self, from: &NodePublicKey, burst: &Burst<'_>, packet: &Packet<'_>, now: Instant) {
        let len = burst.bytes().len() as u64;
        if !self.router().enter(from, packet, now) || self.answers.take(burst.bytes()) {
            return;
        }
        self.rx_bytes.fetch_add(len, Ordering::Relaxed);
        let parts = iter::once(burst.bytes());
        if let Err(closed) = self.device.send_parts(burst.header(), parts) {
            // Its own task notices, and ends.
            trace!(%closed, "a neighbour is about to leave");
        }
    }
}
