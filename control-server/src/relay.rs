//! The DERP relay: carries packets between nodes of the tailnet by their keys
//! (derp/derpserver of the reference implementation).

use std::{
    collections::{HashMap, HashSet},
    future::Future,
    io,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{SinkExt, StreamExt};
use tailnode_wire::{
    derp::{ClientInfo, Codec, Error, Frame, KEEP_ALIVE, PeerGoneReason, ServerInfo},
    disco,
    keys::{DerpServerPublicKey, ExportableKey, NodeKeyPair, NodePublicKey},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
    time::{MissedTickBehavior, interval_at, timeout},
};
use tokio_util::codec::{FramedRead, FramedWrite};

/// Packets that may wait for a slow client; more are dropped, as a network would.
const QUEUE: usize = 64;
/// For the greeting and for each write.
const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) struct Relay {
    key: NodeKeyPair,
    /// The newest connection of each key is the last; packets go there.
    clients: Mutex<HashMap<NodePublicKey, Vec<Client>>>,
    last_client: AtomicU64,
}

struct Client {
    id: u64,
    queue: mpsc::Sender<Frame>,
}

impl Relay {
    pub fn new(key: NodeKeyPair) -> Self {
        Self {
            key,
            clients: Mutex::new(HashMap::new()),
            last_client: AtomicU64::new(0),
        }
    }

    /// By which clients know the relay.
    pub fn public_key(&self) -> DerpServerPublicKey {
        DerpServerPublicKey::from_bytes(*self.key.public.export().as_bytes())
    }

    /// Serves one connection, from after the HTTP upgrade to its end.
    pub async fn serve<R, W>(
        &self,
        reader: R,
        writer: W,
        is_member: impl Fn(&NodePublicKey) -> bool,
    ) -> Result<(), Error>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut reader = FramedRead::new(reader, Codec);
        let mut writer = FramedWrite::new(writer, Codec);
        within(writer.send(Frame::ServerKey(self.public_key()))).await?;
        let key = match within(async { reader.next().await.transpose() }).await? {
            Some(Frame::ClientInfo { key, sealed }) => {
                ClientInfo::open(&sealed, &key, &self.key.private)?;
                key
            }
            _ => return Err(Error::Magic),
        };
        if !is_member(&key) {
            let refused = "this relay serves the nodes of its own tailnet only";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, refused).into());
        }
        within(writer.send(ServerInfo::default().seal(&self.key.private, &key)?)).await?;

        let (queue, mut outgoing) = mpsc::channel(QUEUE);
        let id = self.last_client.fetch_add(1, Ordering::Relaxed);
        let client = Client {
            id,
            queue: queue.clone(),
        };
        self.with_clients(|clients| clients.entry(key).or_default().push(client));
        let mut reached = HashSet::new();
        let reading = self.read(&key, &mut reader, &queue, &mut reached);
        let done = tokio::select! {
            done = reading => done,
            done = write(&mut writer, &mut outgoing) => done,
        };
        self.leave(&key, id, reached);
        done
    }

    async fn read<R: AsyncRead + Unpin>(
        &self,
        key: &NodePublicKey,
        reader: &mut FramedRead<R, Codec>,
        ours: &mpsc::Sender<Frame>,
        reached: &mut HashSet<NodePublicKey>,
    ) -> Result<(), Error> {
        while let Some(frame) = reader.next().await.transpose()? {
            match frame {
                Frame::SendPacket { dst, payload } => {
                    let is_disco = disco::sender(&payload).is_some();
                    if self.pass(&dst, Frame::RecvPacket { src: *key, payload }) {
                        reached.insert(dst);
                    } else if is_disco {
                        // So that a search for a path ends early; WireGuard would not care.
                        offer(
                            ours,
                            Frame::PeerGone {
                                key: dst,
                                reason: PeerGoneReason::NotHere,
                            },
                        );
                    }
                }
                Frame::Ping(data) => offer(ours, Frame::Pong(data)),
                // What else clients say is for statistics or meshes.
                _ => {}
            }
        }
        Ok(())
    }

    /// Queues a frame for the client of `dst`; false: there is none.
    fn pass(&self, dst: &NodePublicKey, frame: Frame) -> bool {
        self.with_clients(|clients| {
            let client = clients.get(dst).and_then(|same| same.last());
            client
                .inspect(|client| offer(&client.queue, frame))
                .is_some()
        })
    }

    /// Whoever had packets from this client learns that it is gone.
    fn leave(&self, key: &NodePublicKey, id: u64, reached: HashSet<NodePublicKey>) {
        let gone = self.with_clients(|clients| {
            let Some(same) = clients.get_mut(key) else {
                return true;
            };
            same.retain(|client| client.id != id);
            let gone = same.is_empty();
            if gone {
                clients.remove(key);
            }
            gone
        });
        if gone {
            for peer in reached {
                let reason = PeerGoneReason::Disconnected;
                self.pass(&peer, Frame::PeerGone { key: *key, reason });
            }
        }
    }

    fn with_clients<T>(
        &self,
        change: impl FnOnce(&mut HashMap<NodePublicKey, Vec<Client>>) -> T,
    ) -> T {
        // No change can panic halfway and leave the map inconsistent.
        change(&mut self.clients.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Queues a frame, or drops it if the client is too slow.
fn offer(queue: &mpsc::Sender<Frame>, frame: Frame) {
    if queue.try_send(frame).is_err() {
        tracing::trace!("DERP frame dropped: the client does not keep up");
    }
}

async fn write<W: AsyncWrite + Unpin>(
    writer: &mut FramedWrite<W, Codec>,
    outgoing: &mut mpsc::Receiver<Frame>,
) -> Result<(), Error> {
    let mut keep_alive = interval_at(tokio::time::Instant::now() + KEEP_ALIVE, KEEP_ALIVE);
    keep_alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let frame = tokio::select! {
            Some(frame) = outgoing.recv() => frame,
            _ = keep_alive.tick() => Frame::KeepAlive,
        };
        within(async {
            writer.feed(frame).await?;
            // What is queued already goes out in the same write.
            while let Ok(frame) = outgoing.try_recv() {
                writer.feed(frame).await?;
            }
            writer.flush().await
        })
        .await?;
    }
}

async fn within<T>(step: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    timeout(PATIENCE, step)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}
