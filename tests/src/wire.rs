use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::{read, write},
};
use tailnode_tun::{create, move_into};

use crate::{Namespace, traffic::Noise};

/// What a link does to packets, each way alike. It is made of two TUN devices and this process, so
/// it asks nothing of the kernel that some kernels lack.
#[derive(Clone, Copy)]
pub struct Wire {
    /// Bytes a second; 0: as many as there are.
    pub rate: u64,
    /// How long each packet is under way.
    pub delay: Duration,
    /// One packet in so many is lost; 0: none.
    pub loss: u64,
    /// One packet in so many overtakes those before it; 0: none.
    pub reorder: u64,
    /// The router's MTU, in bytes. The host does not know of it.
    pub mtu: u32,
}

/// How long a packet waits for its turn at most; then it is dropped, as by a full queue.
const QUEUE: Duration = Duration::from_millis(100);
/// A packet and its virtio_net_hdr.
const ROOM: usize = 10 + 65_536;

impl Wire {
    /// A link that does nothing to packets.
    pub const CLEAN: Wire = Wire {
        rate: 0,
        delay: Duration::ZERO,
        loss: 0,
        reorder: 0,
        mtu: 1500,
    };

    /// Joins the two: by `name` in the router and by `eth0` in the host, both up.
    pub(crate) fn join(self, router: &Namespace, name: &str, host: &Namespace) {
        let make = |name| router.run(|| create(name).map_err(io::Error::other));
        let ends = [make(name).expect("a TUN"), make("wire").expect("a TUN")];
        router
            .run(|| move_into("wire", host.netns(), "eth").map_err(io::Error::other))
            .expect("move the TUN to the host");
        router.ip(&format!("link set {name} mtu {} up", self.mtu));
        host.ip("link set eth0 mtu 1500 up");
        thread::spawn(move || self.carry(&ends));
    }

    /// Carries packets until one of the ends is gone with its namespace.
    fn carry(self, ends: &[OwnedFd; 2]) -> Result<(), Errno> {
        let mut ways = [Way::new(self, 1), Way::new(self, 2)];
        let mut packet = vec![0; ROOM];
        loop {
            let due = ways.iter().filter_map(Way::due).min();
            let timeout = due.map_or(PollTimeout::NONE, |at| {
                let wait = at.saturating_duration_since(Instant::now());
                // Rounded up, or the last millisecond would be spent in turning round.
                PollTimeout::try_from(wait.as_millis() + 1).unwrap_or(PollTimeout::MAX)
            });
            let mut fds = ends
                .each_ref()
                .map(|end| PollFd::new(end.as_fd(), PollFlags::POLLIN));
            poll(&mut fds, timeout)?;
            for (from, way) in ways.iter_mut().enumerate() {
                loop {
                    match read(&ends[from], &mut packet) {
                        Ok(length) => way.enter(&packet[..length], Instant::now()),
                        Err(Errno::EAGAIN) => break,
                        Err(gone) => return Err(gone),
                    }
                }
                while let Some(packet) = way.leave(Instant::now()) {
                    // What the other end has no room for is lost, as in a network.
                    if let Err(gone @ Errno::EBADFD) = write(&ends[1 - from], &packet) {
                        return Err(gone);
                    }
                }
            }
        }
    }
}

/// One direction.
struct Way {
    wire: Wire,
    chance: Noise,
    /// When the last packet so far has left the sender.
    sent: Instant,
    /// Packets under way, by when they arrive and in what order they were sent.
    packets: BTreeMap<(Instant, u64), Vec<u8>>,
    count: u64,
}

impl Way {
    fn new(wire: Wire, seed: u64) -> Way {
        Way {
            wire,
            chance: Noise::new(seed),
            sent: Instant::now(),
            packets: BTreeMap::new(),
            count: 0,
        }
    }

    fn enter(&mut self, packet: &[u8], now: Instant) {
        let begun = self.sent.max(now);
        if begun > now + QUEUE || self.happens(self.wire.loss) {
            return;
        }
        let length = (packet.len() as u64 * 1_000_000).checked_div(self.wire.rate);
        self.sent = begun + Duration::from_micros(length.unwrap_or_default());
        let overtakes = self.happens(self.wire.reorder);
        let delay = if overtakes {
            Duration::ZERO
        } else {
            self.wire.delay
        };
        self.count += 1;
        self.packets
            .insert((self.sent + delay, self.count), packet.to_vec());
    }

    fn due(&self) -> Option<Instant> {
        self.packets.keys().next().map(|(at, _)| *at)
    }

    fn leave(&mut self, now: Instant) -> Option<Vec<u8>> {
        self.due().filter(|at| *at <= now)?;
        self.packets.pop_first().map(|(_, packet)| packet)
    }

    fn happens(&mut self, one_in: u64) -> bool {
        one_in != 0 && self.chance.number().is_multiple_of(one_in)
    }
}
