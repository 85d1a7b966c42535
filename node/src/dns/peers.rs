//! Servers that are peers: asked with packets through the tailnet, where the host has no route.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::mpsc;

use super::message::Request;
use crate::packet::{self, Packet, Transport};

/// Source ports: above those that Linux gives to programs (ip_local_port_range), so that none of
/// the container's own meets them.
const PORTS: RangeInclusive<u16> = 61_000..=65_535;

/// The way through the tailnet, shared by the packet path and all questions.
#[derive(Clone, Debug, Default)]
pub struct Peers(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// Where packets for peers go; until it is set, there is no way.
    questions: OnceLock<mpsc::Sender<Vec<u8>>>,
    /// Questions by the source port they have.
    waiting: Mutex<HashMap<u16, Waiting>>,
    /// How many wait, so that the packet path need not lock when none does.
    count: AtomicUsize,
}

#[derive(Debug)]
struct Waiting {
    server: SocketAddr,
    us: IpAddr,
    answers: mpsc::Sender<Vec<u8>>,
}

impl Peers {
    /// Opens the way: `questions` takes IP packets to be sent as if the container had.
    pub fn open(&self, questions: mpsc::Sender<Vec<u8>>) {
        if self.0.questions.set(questions).is_err() {
            tracing::debug!("the way to DNS servers in the tailnet is already open");
        }
    }

    /// Whether there is a way.
    pub fn is_open(&self) -> bool {
        self.0.questions.get().is_some()
    }

    /// Takes a peer's packet if it answers a question that waits; it is not the container's.
    pub fn take(&self, bytes: &[u8]) -> bool {
        if self.0.count.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let Ok(packet) = Packet::parse(bytes) else {
            return false;
        };
        let Transport::Udp { src, dst } = packet.transport() else {
            return false;
        };
        let waiting = self.waiting();
        let Some(question) = waiting.get(&dst).filter(|question| {
            question.server == SocketAddr::new(packet.src(), src) && question.us == packet.dst()
        }) else {
            return false;
        };
        if !packet.is_fragment()
            && question
                .answers
                .try_send(packet.payload().to_vec())
                .is_err()
        {
            tracing::debug!(server = %question.server, "dropped one of too many DNS answers");
        }
        true
    }

    /// Asks a peer; ends only with its answer.
    pub async fn ask(
        &self,
        server: SocketAddr,
        us: IpAddr,
        request: &Request,
    ) -> io::Result<Vec<u8>> {
        let unreachable = || io::Error::other("there is no way to peers");
        let questions = self.0.questions.get().ok_or_else(unreachable)?;
        let (answers, mut answered) = mpsc::channel(4);
        let question = self.wait(Waiting {
            server,
            us,
            answers,
        })?;
        let id = rand::random();
        let from = SocketAddr::new(us, question.port);
        let packet = packet::udp(from, server, &request.with_id(id)).ok_or_else(unreachable)?;
        questions.send(packet).await.map_err(io::Error::other)?;
        while let Some(answer) = answered.recv().await {
            if request.is_answered_by(id, &answer) {
                return Ok(answer);
            }
        }
        Err(unreachable())
    }

    fn wait(&self, waiting: Waiting) -> io::Result<Question<'_>> {
        let mut all = self.waiting();
        let size = PORTS.end() - PORTS.start() + 1;
        let first: u16 = rand::random_range(0..size);
        let port = (0..size)
            .map(|n| PORTS.start() + (first + n) % size)
            .find(|port| !all.contains_key(port))
            .ok_or_else(|| io::Error::other("too many questions wait"))?;
        all.insert(port, waiting);
        self.0.count.store(all.len(), Ordering::Relaxed);
        Ok(Question { peers: self, port })
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u16, Waiting>> {
        self.0
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A question that waits as long as this lives.
struct Question<'a> {
    peers: &'a Peers,
    port: u16,
}

impl Drop for Question<'_> {
    fn drop(&mut self) {
        let mut all = self.peers.waiting();
        all.remove(&self.port);
        self.peers.0.count.store(all.len(), Ordering::Relaxed);
    }
}
