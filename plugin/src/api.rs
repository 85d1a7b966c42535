//! What the engines' shims and the command line say to the daemon.
//!
//! One connection to a Unix stream socket is one request: a line of JSON, with some also the
//! descriptor of a TUN device or file (SCM_RIGHTS), and back a line of JSON. The socket is its owner's
//! alone, root's or that of the user whose containers the daemon serves, by its mode and its directory's.

use std::{
    collections::BTreeMap,
    env,
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    net::IpAddr,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, recvmsg, sendmsg,
    socket_with,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tailnode_node::Secret;
use tailnode_tun::Interface;

use crate::{Error, options::Told, owner::Owner};

/// The longest message, in bytes, its newline included.
const MAX_MESSAGE: usize = 1 << 20;

/// The name of the socket in the daemon's directory.
pub const SOCKET_NAME: &str = "tailnoded.sock";

/// Where the daemon is: `$TAILNODE_SOCKET`, else `/run/tailnode/tailnoded.sock`, and for who is not
/// root `$XDG_RUNTIME_DIR/tailnode/tailnoded.sock`.
pub fn socket_path() -> PathBuf {
    env::var_os("TAILNODE_SOCKET")
        .map_or_else(|| Owner::here().run_dir().join(SOCKET_NAME), PathBuf::from)
}

/// What can be asked of the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    /// Give the device of a container, which comes along, a node. Answered with
    /// [`Response::Attached`] when the node has its addresses and the device is in the container,
    /// where the client takes it meanwhile. To ask again for the same device
    /// is harmless; for another device, the earlier node is stopped first. A client that is gone
    /// when the answer comes did not set the device up: its node is stopped.
    Attach {
        /// Who asks.
        engine: Engine,
        /// The engine's id of the container.
        container_id: String,
        /// Its name; where it is empty, Podman's database has it.
        container_name: String,
        /// The engine's id of the network.
        network_id: String,
        /// Its name.
        network_name: String,
        /// The network's options.
        network_options: BTreeMap<String, String>,
        /// Those of this container on it.
        endpoint_options: BTreeMap<String, String>,
        /// The container's annotations, where the caller was told; Podman's database has its own.
        annotations: BTreeMap<String, String>,
    },
    /// Whether a network may have these options under the host's configuration: `Ok`, or why not.
    Allows {
        /// Its name.
        network_name: String,
        /// Its options.
        network_options: BTreeMap<String, String>,
    },
    /// Stop the container's node on this network; harmless if it has none.
    Detach {
        /// As it was attached.
        engine: Engine,
        /// As it was attached.
        container_id: String,
        /// As it was attached.
        network_id: String,
    },
    /// Whether the container has a node on this network. Answered with [`Response::Served`].
    Serves {
        /// As it was attached.
        engine: Engine,
        /// As it was attached.
        container_id: String,
        /// As it was attached.
        network_id: String,
    },
    /// Stop the nodes that CNI has attached to a network and that nobody owns any more.
    Collect {
        /// The network's name.
        network_name: String,
        /// The attachments that are owned: container ids, with their network ids.
        owned: Vec<(String, String)>,
    },
    /// Whether Podman connects this container to networks. Answered with [`Response::Connects`].
    Connects {
        /// Podman's id of the container.
        container_id: String,
    },
    /// All containers with a node.
    Status,
    /// Keep an auth key for the nodes that join this network from now on; `None`: forget it.
    Login {
        /// The network's name.
        network: String,
        /// The key.
        #[serde(with = "exposed")]
        key: Option<Secret>,
    },
    /// What holds for a container on each of its networks, and who set it. Answered with
    /// [`Response::Explained`].
    Explain {
        /// The container's name, or the beginning of its id.
        container: String,
    },
    /// Take a node that no container uses out of its tailnet, and remove its state. Answered with
    /// [`Response::Node`].
    Forget {
        /// Its hostname, or the name of the container that used it last.
        node: String,
        /// Its network, where there is more than one of the name.
        network: Option<String>,
        /// Only the state is to go: the tailnet keeps the node.
        local: bool,
    },
    /// Write a node that no container uses, with its keys, to the file whose descriptor comes along.
    /// Answered with [`Response::Node`].
    Export {
        /// As to forget it.
        node: String,
        /// As to forget it.
        network: Option<String>,
    },
    /// Keep the node in the file whose descriptor comes along. Answered with [`Response::Node`].
    Import {
        /// The network that it is to be on; else the one that it was on.
        network: Option<String>,
        /// What the file is to be called in messages.
        origin: PathBuf,
    },
    /// Take the nodes of a container out of their tailnets; they stay in the list as stopped. The
    /// container joins again when it is started again.
    Logout {
        /// The container's name, or the beginning of its id.
        container: String,
    },
}

/// A secret as it is written on the socket, which is its owner's alone, and nowhere else.
mod exposed {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use tailnode_node::Secret;

    pub fn serialize<S: Serializer>(
        secret: &Option<Secret>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        secret.as_ref().map(Secret::expose).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Secret>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        Ok(text.map(Secret::new))
    }
}

/// The daemon's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "result", content = "value", rename_all = "kebab-case")]
pub enum Response {
    /// The node is up: how to set up the container's device and resolver.
    Attached {
        /// The device.
        interface: Interface,
        /// The node's resolver; none where the container's DNS is to stay as it is.
        dns_servers: Vec<IpAddr>,
        /// Domains to complete short names with.
        search_domains: Vec<String>,
    },
    /// The container's device and how it should be set up now; nothing where it has no node.
    Served(Option<Served>),
    /// Whether it does.
    Connects(bool),
    /// Done.
    Ok,
    /// Done to this node.
    Node {
        /// Its network.
        network: String,
        /// Its hostname.
        hostname: String,
    },
    /// Every container with a node, by name.
    Status(Vec<ContainerStatus>),
    /// The container's options, by network.
    Explained(Vec<Explained>),
    /// It was not done. [`call`] returns this as [`Error::Daemon`].
    Error {
        /// Why, and what to do.
        message: String,
    },
}

/// A container's device that a node serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Served {
    /// Its name in the container.
    pub device: String,
    /// How it should be set up.
    pub interface: Interface,
}

/// A container engine.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// Podman, through netavark or its hooks.
    #[default]
    Podman,
    /// Docker, through its plugin socket.
    Docker,
    /// Whatever runs plugins of the Container Network Interface: Kubernetes, containerd, CRI-O.
    Cni,
}

impl Engine {
    /// The command by which a person stops a container, behind a blank and in brackets; nothing
    /// where that depends on what runs CNI.
    pub(crate) fn stop(self, container: &str) -> String {
        match self {
            Engine::Podman | Engine::Docker => format!(" (`{self} stop {container}`)"),
            Engine::Cni => String::new(),
        }
    }
}

impl std::fmt::Display for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Engine::Podman => "podman",
            Engine::Docker => "docker",
            Engine::Cni => "cni",
        })
    }
}

/// A container's node on one network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContainerStatus {
    /// The container's name.
    pub container: String,
    /// The engine's id of it.
    pub container_id: String,
    /// The engine.
    pub engine: Engine,
    /// The network's name.
    pub network: String,
    /// The device's name in the container; empty when the device is gone.
    pub interface: String,
    /// The node.
    pub node: tailnode_node::Status,
}

/// A container's options on one network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explained {
    /// The container's name.
    pub container: String,
    /// The engine's id of it.
    pub container_id: String,
    /// The engine.
    pub engine: Engine,
    /// The network's name.
    pub network: String,
    /// All of them, in the order of the manual.
    pub options: Vec<Told>,
}

/// Whether a person who writes `wanted` means this container: by its name, or by the beginning of
/// its id.
pub fn is_called(name: &str, id: &str, wanted: &str) -> bool {
    name == wanted || (!wanted.is_empty() && id.starts_with(wanted))
}

/// Asks the daemon at `socket`, and waits for its answer for at most `timeout`. Blocks.
pub fn call(
    socket: &Path,
    request: &Request,
    device: Option<BorrowedFd>,
    timeout: Duration,
) -> Result<Response, Error> {
    ask(socket, request, device, timeout)?.answer()
}

/// Asks the daemon at `socket`, whose answer is to be there within `timeout`. Blocks for a moment.
pub fn ask(
    socket: &Path,
    request: &Request,
    device: Option<BorrowedFd>,
    timeout: Duration,
) -> Result<Asked, Error> {
    let stream = connect(socket, timeout).map_err(|cause| match cause.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Error::NotRunning {
            socket: socket.to_owned(),
        },
        io::ErrorKind::PermissionDenied => Error::Denied {
            socket: socket.to_owned(),
        },
        _ => unanswered(socket, timeout, cause),
    })?;
    let asked = Asked {
        stream,
        socket: socket.to_owned(),
        timeout,
        deadline: Instant::now() + timeout,
    };
    send(&asked.stream, request, device, asked.deadline)
        .map_err(|cause| unanswered(socket, timeout, cause))?;
    Ok(asked)
}

/// A request that the daemon is at. To drop it is to leave before the answer.
#[derive(Debug)]
pub struct Asked {
    stream: UnixStream,
    socket: PathBuf,
    timeout: Duration,
    deadline: Instant,
}

impl Asked {
    /// Waits for the answer. Blocks.
    pub fn answer(self) -> Result<Response, Error> {
        let received = receive(&self.stream, self.deadline);
        match received.map_err(|cause| unanswered(&self.socket, self.timeout, cause))? {
            (Response::Error { message }, _) => Err(Error::Daemon { message }),
            (response, _) => Ok(response),
        }
    }
}

fn unanswered(socket: &Path, timeout: Duration, cause: io::Error) -> Error {
    Error::Unanswered {
        socket: socket.to_owned(),
        cause: match cause.kind() {
            // What the kernel calls a timeout.
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                io::Error::new(io::ErrorKind::TimedOut, format!("nothing for {timeout:?}"))
            }
            _ => cause,
        },
    }
}

/// Connects, which waits while the daemon's queue of clients is full.
fn connect(socket: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(socket)?;
    let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
    let stream = UnixStream::from(socket_with(family, kind, SocketFlags::CLOEXEC, None)?);
    stream.set_write_timeout(Some(timeout))?;
    rustix::net::connect(&stream, &address)?;
    Ok(stream)
}

/// Writes one message, and with its first byte the descriptor.
pub(crate) fn send<T: Serialize>(
    mut stream: &UnixStream,
    message: &T,
    device: Option<BorrowedFd>,
    deadline: Instant,
) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    if line.len() > MAX_MESSAGE {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the message is longer than 1 MiB",
        ));
    }
    stream.set_write_timeout(Some(remaining(deadline)?))?;
    let mut sent = 0;
    if let Some(device) = device {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let devices = [device];
        if !control.push(SendAncillaryMessage::ScmRights(&devices)) {
            return Err(io::Error::other("no room for the descriptor"));
        }
        sent = sendmsg(
            stream,
            &[IoSlice::new(&line)],
            &mut control,
            SendFlags::NOSIGNAL,
        )?;
    }
    stream.write_all(&line[sent..])
}

/// Reads one message and the descriptor that came with it.
pub(crate) fn receive<T: DeserializeOwned>(
    mut stream: &UnixStream,
    deadline: Instant,
) -> io::Result<(T, Option<OwnedFd>)> {
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut line = Vec::new();
    let mut device = None;
    let mut chunk = [0; 16 * 1024];
    while line.last() != Some(&b'\n') {
        stream.set_read_timeout(Some(remaining(deadline)?))?;
        let read = if line.is_empty() {
            // A descriptor comes with the first byte, or not at all.
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let got = recvmsg(
                stream,
                &mut [IoSliceMut::new(&mut chunk)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            )?;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(devices) = message {
                    device = devices.last();
                }
            }
            got.bytes
        } else {
            stream.read(&mut chunk)?
        };
        if read == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the connection was closed in the middle",
            ));
        }
        line.extend_from_slice(&chunk[..read]);
        if line.len() > MAX_MESSAGE {
            return Err(invalid("the message is longer than 1 MiB"));
        }
    }
    // The cause is not told in full: it would quote what it fails on, which may be a secret.
    let message = serde_json::from_slice(&line).map_err(|error| {
        invalid(&format!(
            "the message is not of this version (from its {}. byte on)",
            error.column()
        ))
    })?;
    Ok((message, device))
}

/// The time that is left, which is never zero: zero would mean no limit to the kernel.
fn remaining(deadline: Instant) -> io::Result<Duration> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
        left => Ok(left),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Seek, SeekFrom},
        os::{fd::AsFd, unix::net::UnixListener},
        thread,
    };
    use tailnode_tun::Exit;

    use proptest::prelude::*;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn attach() -> Request {
        Request::Attach {
            engine: Engine::Podman,
            container_id: "ae48c7267541".into(),
            container_name: "c1".into(),
            network_id: "7d2f".into(),
            network_name: "tn1".into(),
            network_options: [("tags".to_owned(), "tag:foo".to_owned())].into(),
            endpoint_options: [("hostname".to_owned(), "zz".to_owned())].into(),
            annotations: [("tailscale.tags".to_owned(), "tag:x".to_owned())].into(),
        }
    }

    #[test]
    fn the_words_on_the_socket() {
        assert_eq!(
            serde_json::to_value(attach()).unwrap(),
            serde_json::json!({
                "op": "attach", "engine": "podman", "container_id": "ae48c7267541",
                "container_name": "c1",
                "network_id": "7d2f", "network_name": "tn1",
                "network_options": {"tags": "tag:foo"}, "endpoint_options": {"hostname": "zz"},
                "annotations": {"tailscale.tags": "tag:x"},
            })
        );
        assert_eq!(
            serde_json::to_string(&Request::Status).unwrap(),
            r#"{"op":"status"}"#
        );
        let login = Request::Login {
            network: "tn1".into(),
            key: Some(Secret::new("tskey-auth-QQQQ")),
        };
        assert_eq!(
            serde_json::to_string(&login).unwrap(),
            r#"{"op":"login","network":"tn1","key":"tskey-auth-QQQQ"}"#
        );
        assert!(!format!("{login:?}").contains("QQQQ"));
        assert_eq!(
            serde_json::to_string(&Response::Ok).unwrap(),
            r#"{"result":"ok"}"#
        );
        let attached = Response::Attached {
            interface: Interface {
                addresses: vec!["100.64.0.1/32".parse().unwrap()],
                routes: vec!["100.64.0.0/10".parse().unwrap()],
                mtu: 1280,
                index: 0,
                trap_dns: false,
                exit: Exit::BesideLan,
                forwards: true,
            },
            dns_servers: vec!["100.100.100.100".parse().unwrap()],
            search_domains: vec!["x.ts.net".into()],
        };
        assert_eq!(
            serde_json::to_value(attached).unwrap(),
            serde_json::json!({"result": "attached", "value": {
                "interface": {
                    "addresses": ["100.64.0.1/32"], "routes": ["100.64.0.0/10"], "mtu": 1280,
                    "index": 0, "trap_dns": false, "exit": "beside-lan", "forwards": true,
                },
                "dns_servers": ["100.100.100.100"], "search_domains": ["x.ts.net"],
            }})
        );
    }

    #[test]
    fn a_descriptor_arrives_with_its_request() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut file: File = tempfile::tempfile().unwrap();
        file.write_all(b"the very file").unwrap();
        send(&ours, &attach(), Some(file.as_fd()), soon()).unwrap();
        let (request, device) = receive::<Request>(&theirs, soon()).unwrap();
        assert_eq!(request, attach());
        let mut arrived = File::from(device.unwrap());
        arrived.seek(SeekFrom::Start(0)).unwrap();
        let mut text = String::new();
        arrived.read_to_string(&mut text).unwrap();
        assert_eq!(text, "the very file");
    }

    #[test]
    fn of_many_descriptors_none_is_left_open() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let writers = [writer.as_fd(); 8];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&writers)));
        let line = [IoSlice::new(b"{\"op\":\"status\"}\n")];
        sendmsg(&ours, &line, &mut control, SendFlags::empty()).unwrap();
        let (request, device) = receive::<Request>(&theirs, soon()).unwrap();
        assert_eq!(request, Request::Status);
        assert!(device.is_some());
        drop((device, writer, ours, theirs));
        // It ends when the last copy of its other end is closed.
        assert_eq!(reader.read_to_end(&mut Vec::new()).unwrap(), 0);
    }

    #[test]
    fn what_cannot_be_read_is_not_repeated() {
        for line in [
            r#"{"op":"tskey-auth-QQQQ"}"#,
            r#"{"op":"login","network":"a","key":["tskey-auth-QQQQ"]}"#,
            r#"{"op":"attach","network_options":"tskey-auth-QQQQ"}"#,
            "tskey-auth-QQQQ",
        ] {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            ours.write_all(format!("{line}\n").as_bytes()).unwrap();
            let error = receive::<Request>(&theirs, soon()).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("QQQQ"), "{error}");
        }
    }

    #[test]
    fn a_daemon_that_takes_no_connection_does_not_hold_up_a_start() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s.sock");
        let kind = (AddressFamily::UNIX, SocketType::STREAM);
        let listener = socket_with(kind.0, kind.1, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let _only_one_that_fits = UnixStream::connect(&path).unwrap();
        let error = call(&path, &Request::Status, None, Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("nothing for 50ms"), "{error}");
    }

    #[test]
    fn a_long_request_arrives_and_a_longer_one_does_not() {
        let with = |length| Request::Detach {
            engine: Engine::Podman,
            container_id: "a".repeat(length),
            network_id: String::new(),
        };
        let (ours, theirs) = UnixStream::pair().unwrap();
        let writer = thread::spawn(move || send(&ours, &with(900_000), None, soon()));
        assert_eq!(
            receive::<Request>(&theirs, soon()).unwrap().0,
            with(900_000)
        );
        writer.join().unwrap().unwrap();

        let (mut ours, theirs) = UnixStream::pair().unwrap();
        assert!(send(&ours, &with(MAX_MESSAGE), None, soon()).is_err());
        let writer = thread::spawn(move || ours.write_all(&vec![b' '; MAX_MESSAGE + 1]));
        let error = receive::<Request>(&theirs, soon()).unwrap_err();
        assert!(error.to_string().contains("1 MiB"), "{error}");
        drop(theirs);
        // Whether all of it could be written depends on the size of the socket's buffer.
        let _ = writer.join().unwrap();
    }

    #[test]
    fn a_daemon_that_is_not_there_or_says_no_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s.sock");
        let ask = || call(&socket, &Request::Status, None, Duration::from_secs(10));
        let error = ask().unwrap_err().to_string();
        assert!(
            error.contains("tailnoded is not running") && error.contains("s.sock"),
            "{error}"
        );

        let listener = UnixListener::bind(&socket).unwrap();
        let daemon = thread::spawn(move || {
            let (first, _) = listener.accept().unwrap();
            receive::<Request>(&first, soon()).unwrap();
            send(
                &first,
                &Response::Error {
                    message: "no".into(),
                },
                None,
                soon(),
            )
            .unwrap();
            let (second, _) = listener.accept().unwrap();
            receive::<Request>(&second, soon()).unwrap();
        });
        assert!(matches!(ask(), Err(Error::Daemon { message }) if message == "no"));
        let error = ask().unwrap_err().to_string();
        assert!(error.contains("did not answer"), "{error}");
        daemon.join().unwrap();
        let error = ask().unwrap_err();
        assert!(matches!(error, Error::NotRunning { .. }), "{error}");
    }

    proptest! {
        #[test]
        fn no_bytes_break_the_reader(bytes: Vec<u8>) {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            ours.write_all(&bytes).unwrap();
            drop(ours);
            let _ = receive::<Request>(&theirs, soon());
        }

        #[test]
        fn a_request_is_read_back_as_it_was_written(
            ids in [".*", ".*", ".*", ".*"],
            options in prop::collection::btree_map(".*", ".*", 0..5),
        ) {
            let [container_id, container_name, network_id, network_name] = ids;
            let request = Request::Attach {
                engine: Engine::Cni,
                container_id, container_name, network_id, network_name,
                network_options: options.clone(),
                endpoint_options: options.clone(),
                annotations: options,
            };
            let (ours, theirs) = UnixStream::pair().unwrap();
            send(&ours, &request, None, soon()).unwrap();
            let (read, device) = receive::<Request>(&theirs, soon()).unwrap();
            prop_assert_eq!(read, request);
            prop_assert!(device.is_none());
        }
    }
}
