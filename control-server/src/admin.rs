//! How the command line reaches the state: through the running server's socket, or, where none
//! runs, directly. Either way the same [`Request`] does the same.

use std::{io, os::unix::fs::PermissionsExt, path::Path, sync::Arc};

use chrono::Utc;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use tailnode_wire::tailcfg::{DerpMap, NodeId};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
};

use crate::{
    AuthKey, DEFAULT_DOMAIN, Error, KeySpec, NodeSummary,
    store::Store,
    tailnet::{Names, Site, State, Tailnet},
};

/// In the state directory, which only its owner can enter.
const SOCKET: &str = "admin.sock";
/// A policy is the longest that is ever sent.
const MAX_MESSAGE: u64 = 16 << 20;

/// What an administrator asks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// Make an auth key.
    CreateKey(KeySpec),
    /// All auth keys, without their secrets.
    ListKeys,
    /// End an auth key.
    ExpireKey {
        /// Which, by its public part.
        id: String,
    },
    /// All nodes.
    ListNodes,
    /// Forget a node.
    DeleteNode {
        /// Which.
        id: NodeId,
    },
    /// Make a node log in again.
    ExpireNode {
        /// Which.
        id: NodeId,
    },
    /// Call a node otherwise.
    RenameNode {
        /// Which.
        id: NodeId,
        /// One label of DNS, not yet another node's.
        name: String,
    },
    /// Let a node in that waits.
    ApproveNode {
        /// The last part of its AuthURL.
        id: String,
        /// Its owner; `None`: `user@DOMAIN`.
        user: Option<String>,
    },
    /// Let a node route what it offers.
    ApproveRoutes {
        /// Which.
        id: NodeId,
        /// All, some or one of its routes.
        routes: Vec<IpNet>,
    },
    /// Take such an approval back.
    RevokeRoutes {
        /// Which.
        id: NodeId,
        /// All, some or one of its routes.
        routes: Vec<IpNet>,
    },
    /// Enforce another policy.
    SetPolicy {
        /// HuJSON.
        text: String,
    },
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Answer {
    /// It is done.
    Done,
    /// A new auth key; it cannot be shown again.
    Key(String),
    /// The auth keys.
    Keys(Vec<AuthKey>),
    /// The nodes.
    Nodes(Vec<NodeSummary>),
    /// The node that was let in.
    Node(NodeId),
    /// It cannot be done, and why.
    Refused(String),
}

impl Request {
    /// Does what is asked.
    pub(crate) fn apply(self, state: &mut State) -> Result<Answer, Error> {
        let now = Utc::now();
        Ok(match self {
            Self::CreateKey(spec) => Answer::Key(state.create_key(spec, now)?),
            Self::ListKeys => Answer::Keys(state.keys()?),
            Self::ExpireKey { id } => {
                state.expire_key(&id, now)?;
                Answer::Done
            }
            Self::ListNodes => Answer::Nodes(state.nodes()),
            Self::DeleteNode { id } => {
                state.remove(id)?;
                Answer::Done
            }
            Self::ExpireNode { id } => {
                state.expire(id, now)?;
                Answer::Done
            }
            Self::RenameNode { id, name } => {
                state.call(id, &name)?;
                Answer::Done
            }
            Self::ApproveNode { id, user } => Answer::Node(state.approve(&id, user, now)?),
            Self::ApproveRoutes { id, routes } => {
                state.approve_routes(id, &routes)?;
                Answer::Done
            }
            Self::RevokeRoutes { id, routes } => {
                state.revoke_routes(id, &routes)?;
                Answer::Done
            }
            Self::SetPolicy { text } => {
                state.set_policy(&text)?;
                Answer::Done
            }
        })
    }
}

/// Asks the server whose state is in `dir`, or does it in its place where none runs.
pub async fn ask(dir: &Path, request: Request) -> Result<Answer, Error> {
    let mut socket = match UnixStream::connect(dir.join(SOCKET)).await {
        Ok(socket) => socket,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            let store = Store::open(dir)?;
            let site = Site::offline(&store)?;
            return request.apply(&mut Tailnet::open(store, site, None)?.state());
        }
        Err(error) => return Err(Error::Admin(error)),
    };
    let text = serde_json::to_vec(&request).map_err(Error::Request)?;
    let mut answer = Vec::new();
    let exchange = async {
        socket.write_all(&text).await?;
        socket.shutdown().await?;
        socket.read_to_end(&mut answer).await
    };
    exchange.await.map_err(Error::Admin)?;
    match serde_json::from_slice(&answer).map_err(Error::Request)? {
        Answer::Refused(why) => Err(Error::Refused(why)),
        answer => Ok(answer),
    }
}

/// The socket of the server whose state is in `dir`.
pub(crate) fn listen(dir: &Path) -> io::Result<UnixListener> {
    let path = dir.join(SOCKET);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves administrators, one after the other, until it is dropped.
pub(crate) async fn serve(listener: UnixListener, tailnet: Arc<Tailnet>, policy_is_a_file: bool) {
    loop {
        let served = async {
            let (mut socket, _) = listener.accept().await?;
            let mut text = Vec::new();
            (&mut socket)
                .take(MAX_MESSAGE)
                .read_to_end(&mut text)
                .await?;
            let answer = answer(&text, &tailnet, policy_is_a_file);
            socket.write_all(&serde_json::to_vec(&answer)?).await
        };
        if let Err(error) = served.await {
            tracing::warn!("an administrator's request failed: {error}");
        }
    }
}

fn answer(text: &[u8], tailnet: &Tailnet, policy_is_a_file: bool) -> Answer {
    let done = match serde_json::from_slice(text) {
        Ok(Request::SetPolicy { .. }) if policy_is_a_file => Err(Error::PolicyIsAFile),
        Ok(request) => tailnet.change(|state: &mut State| request.apply(state)),
        Err(error) => Err(Error::Request(error)),
    };
    done.unwrap_or_else(|error| Answer::Refused(error.to_string()))
}

impl Site {
    /// For a look at the state while no server runs.
    fn offline(store: &Store) -> Result<Self, Error> {
        let url = "http://localhost".parse().map_err(Error::Url)?;
        let domain = store.domain()?.unwrap_or_else(|| DEFAULT_DOMAIN.to_owned());
        Ok(Self {
            url,
            domain,
            derp_map: DerpMap::default(),
            names: Names::default(),
        })
    }
}
