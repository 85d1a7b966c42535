//! The program: its sockets, its signals, and what its requests do.

use std::{
    fs::{self, DirBuilder, File, Permissions, TryLockError},
    io,
    os::{
        fd::OwnedFd,
        linux::net::SocketAddrExt,
        unix::{
            fs::{DirBuilderExt, PermissionsExt},
            net::{SocketAddr, UnixDatagram},
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::process::setsid;
use tokio::{
    net::{UnixListener, UnixStream},
    signal::unix::{Signal, SignalKind, signal},
};

use crate::{
    Error,
    api::{self, Engine, Request, Response},
    docker::Plugin,
    endpoints::{Endpoints, Guest, Key, Ready, Tun},
    identities::Kept,
    interface::blocking,
    options::{Layer, Marks},
    owner::Owner,
    podman,
    secrets::Secrets,
};

/// For an attach from beginning to end: with the engine's own work before and after, a start fails
/// within ten seconds. netavark makes all other containers of the host wait meanwhile.
const ATTACH: Duration = Duration::from_millis(8_000);

/// For a client to send its request, and to take the answer.
const TALK: Duration = Duration::from_secs(5);

/// Gives every container its own node on a tailnet.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "tailnoded", version)]
pub struct Settings {
    /// Where the nodes' keys are kept.
    #[arg(long, value_name = "DIRECTORY", default_value_os_t = Owner::here().state())]
    pub state: PathBuf,
    /// Where the socket of the shims and of `tailnode` is made.
    #[arg(long, value_name = "DIRECTORY", default_value_os_t = Owner::here().run_dir())]
    pub run_dir: PathBuf,
    /// The options of all containers.
    #[arg(long, value_name = "FILE", default_value_os_t = Owner::here().config())]
    pub config: PathBuf,
    /// Where Docker looks for plugins' sockets; a user's own tailnoded serves none.
    #[arg(long, value_name = "DIRECTORY", default_value = Owner::here().docker_plugin_dir())]
    pub docker_plugin_dir: Option<PathBuf>,
    /// Docker's API.
    #[arg(long, value_name = "SOCKET", default_value = "/var/run/docker.sock")]
    pub docker_socket: PathBuf,
    /// Podman's state, where containers' labels are read.
    #[arg(long, value_name = "FILE", default_value_os_t = Owner::here().podman_db())]
    pub podman_db: PathBuf,
    /// How far the kernel is trusted to take many packets as one: lower it where packets get lost.
    #[arg(long, value_enum, default_value_t)]
    pub offload: Offload,
    /// Detached from whoever started it, and only for as long as there are nodes.
    #[arg(long, hide = true)]
    pub on_demand: bool,
}

/// Which packets may travel between kernel and daemon as one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Offload {
    /// All that this kernel takes.
    #[default]
    All,
    /// TCP's from and to the containers, and those to one peer.
    Tcp,
    /// None: a system call for each packet.
    None,
}

impl From<Offload> for tailnode_node::Offload {
    fn from(offload: Offload) -> Self {
        match offload {
            Offload::All => Self::All,
            Offload::Tcp => Self::Tcp,
            Offload::None => Self::None,
        }
    }
}

/// Runs the daemon until it gets SIGTERM or SIGINT; then all nodes are stopped. The shims' socket may be
/// one that systemd listens on.
pub async fn run(
    settings: Settings,
    activated: Option<std::os::unix::net::UnixListener>,
) -> Result<(), Error> {
    let mut patience = Duration::ZERO;
    if settings.on_demand {
        // One before it, in a network that Podman has ended, may still be ending.
        patience = Duration::from_secs(2);
        // Nobody's terminal or session ends it.
        setsid().map_err(|cause| Error::file("begin a session in", "the daemon")(cause.into()))?;
    }
    let defaults = Layer::of_file(&settings.config)?;
    private_directory(&settings.state)?;
    let nodes = settings.state.join("nodes");
    let _held = [
        hold(&nodes, patience).await?,
        hold(&settings.run_dir, patience).await?,
    ];
    if let Some(directory) = &settings.docker_plugin_dir {
        let made = fs::create_dir_all(directory);
        made.map_err(Error::file("make the directory", directory))?;
    }

    // Before the sockets: whoever can ask us to stop must be heard.
    let mut stop = Stop::new().map_err(Error::file("listen for signals in", "the daemon"))?;
    let socket = settings.run_dir.join(api::SOCKET_NAME);
    let (shims_listener, shims_file) = match activated {
        Some(listener) => {
            let adopt = || {
                listener.set_nonblocking(true)?;
                UnixListener::from_std(listener)
            };
            // systemd's file, which stays.
            (adopt().map_err(Error::file("listen at", &socket))?, None)
        }
        None => {
            let (listener, file) = listen(socket.clone()).await?;
            (listener, Some(file))
        }
    };
    let (docker_listener, docker_file) = match settings.docker_plugin_dir {
        Some(directory) => {
            let (listener, file) = listen(directory.join("tailscale.sock")).await?;
            (Some(listener), Some(file))
        }
        None => (None, None),
    };

    let secrets = Secrets::new(
        settings.state.join("keys"),
        std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from),
        settings.podman_db.with_file_name("secrets"),
    );
    let endpoints = Endpoints::new(nodes, defaults, secrets, settings.offload.into())?;
    let endpoints = Arc::new(endpoints);
    let plugin = Plugin::new(endpoints.clone(), settings.docker_socket);
    let shims = Arc::new(Shims {
        endpoints: endpoints.clone(),
        podman_db: settings.podman_db,
    });
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        socket = %socket.display(),
        docker = docker_file.as_ref().map(|file| tracing::field::display(file.0.display())),
        "ready"
    );
    notify("READY=1");

    let docker = docker_listener.map(|listener| (listener, plugin));
    let plugin = docker.as_ref().map(|(_, plugin)| plugin.clone());
    tokio::spawn(report_orphans(shims.clone(), plugin));
    tokio::select! {
        () = stop.wanted() => {}
        () = shims.serve(shims_listener) => {}
        result = serve_docker(docker) => {
            result.map_err(Error::file("serve", "Docker"))?;
        }
        () = endpoints.unused(), if settings.on_demand => {
            tracing::info!("the last node has ended");
        }
    }
    notify("STOPPING=1");
    tracing::info!("stopping all nodes");
    drop((shims_file, docker_file));
    endpoints.close().await;
    Ok(())
}

/// Logs which containers lost their nodes when an earlier daemon ended: the engines tell only of
/// containers that start.
async fn report_orphans(shims: Arc<Shims>, plugin: Option<Arc<Plugin>>) {
    let database = shims.podman_db.clone();
    for container in blocking(move || podman::running(&database)).await {
        shims
            .endpoints
            .report_orphan(Engine::Podman, &container.id, &container.name);
    }
    if let Some(plugin) = plugin {
        plugin.report_orphans().await;
    }
}

/// Serves Docker, if at all.
async fn serve_docker(docker: Option<(UnixListener, Arc<Plugin>)>) -> io::Result<()> {
    match docker {
        Some((listener, plugin)) => axum::serve(listener, plugin.router()).await,
        None => std::future::pending().await,
    }
}

/// Serves the shims and the command line.
struct Shims {
    endpoints: Arc<Endpoints>,
    podman_db: PathBuf,
}

impl Shims {
    async fn serve(self: Arc<Self>, listener: UnixListener) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let shims = self.clone();
                    tokio::spawn(async move {
                        // It left, or has nothing to say: that is its own business.
                        if let Err(error) = shims.converse(stream).await {
                            tracing::debug!("a client of the socket: {error}");
                        }
                    });
                }
                Err(error) => {
                    // Out of descriptors, most likely: some may be free again soon.
                    tracing::error!("cannot take a connection: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn converse(&self, stream: UnixStream) -> io::Result<()> {
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        let (stream, request) = blocking(move || {
            let request = api::receive::<Request>(&stream, Instant::now() + TALK);
            (stream, request)
        })
        .await;
        let mut ready = None;
        let response = match request {
            Ok((request, device)) => self.answer(request, device, &mut ready).await,
            Err(cause) if cause.kind() == io::ErrorKind::InvalidData => {
                let error = Error::Message { cause };
                tracing::warn!("{error}");
                Err(error)
            }
            Err(cause) => return Err(cause),
        };
        let response = response.unwrap_or_else(|error| Response::Error {
            message: error.to_string(),
        });
        let sent =
            blocking(move || api::send(&stream, &response, None, Instant::now() + TALK)).await;
        if let (Err(_), Some(ready)) = (&sent, ready) {
            // Nobody sets the device up now.
            self.endpoints.undo(ready).await;
        }
        sent
    }

    /// The name of a container; of one that Podman does not know, its short id.
    async fn podman_name(&self, container_id: &str) -> String {
        let (database, id) = (self.podman_db.clone(), container_id.to_owned());
        let name = blocking(move || podman::name(&database, &id)).await;
        name.unwrap_or_else(|| container_id.get(..12).unwrap_or(container_id).to_owned())
    }

    /// Does what is asked; a node that was made ready for it is also put into `ready`.
    async fn answer(
        &self,
        request: Request,
        device: Option<OwnedFd>,
        ready: &mut Option<Ready>,
    ) -> Result<Response, Error> {
        match request {
            Request::Attach {
                engine,
                container_id,
                container_name,
                network_id,
                network_name,
                network_options,
                endpoint_options,
                annotations,
            } => {
                let deadline = tokio::time::Instant::now() + ATTACH;
                let container_name = if container_name.is_empty() {
                    self.podman_name(&container_id).await
                } else {
                    container_name
                };
                let subject = format!("container {container_name} on network {network_name}");
                let attach = async {
                    let device = device.ok_or(Error::NoDevice)?;
                    let of_endpoint = Layer::of_endpoint(&endpoint_options)?;
                    let of_network = Layer::of_network(&network_name, &network_options)?;
                    let (mut marks, exist) = match engine {
                        Engine::Podman => {
                            let (database, id) = (self.podman_db.clone(), container_id.clone());
                            let look =
                                move || (podman::marks(&database, &id), podman::names(&database));
                            blocking(look).await
                        }
                        Engine::Docker | Engine::Cni => (Marks::default(), None),
                    };
                    marks.annotations.extend(annotations);
                    let of_marks = Layer::of_marks(&marks)?;
                    let guest = Guest {
                        key: key(engine, container_id.clone(), network_id),
                        container_id,
                        container_name,
                        network_name,
                        exist,
                        address: None,
                        layers: vec![of_network, of_marks, of_endpoint],
                    };
                    let device = Tun::Given(device);
                    self.endpoints.attach(guest, device, deadline).await
                };
                match attach.await {
                    Ok(now) => Ok(attached(ready.insert(now))),
                    Err(error) => {
                        tracing::warn!("refused: {subject}: {error}");
                        Err(error)
                    }
                }
            }
            Request::Allows {
                network_name,
                network_options,
            } => {
                let of_network = Layer::of_network(&network_name, &network_options)?;
                self.endpoints.allows(&of_network)?;
                Ok(Response::Ok)
            }
            Request::Detach {
                engine,
                container_id,
                network_id,
            } => {
                let key = key(engine, container_id, network_id);
                self.endpoints.detach(&key).await;
                Ok(Response::Ok)
            }
            Request::Serves {
                engine,
                container_id,
                network_id,
            } => {
                let key = key(engine, container_id, network_id);
                Ok(Response::Served(self.endpoints.served(&key)))
            }
            Request::Connects { container_id } => {
                let (database, id) = (self.podman_db.clone(), container_id.clone());
                let connects = blocking(move || podman::connects(&database, &id)).await;
                let connects = connects.ok_or(Error::UnknownNetworks { container_id })?;
                Ok(Response::Connects(connects))
            }
            Request::Collect {
                network_name,
                owned,
            } => {
                self.endpoints.collect(&network_name, &owned).await;
                Ok(Response::Ok)
            }
            Request::Login { network, key } => {
                self.endpoints.login(network, key).await?;
                Ok(Response::Ok)
            }
            Request::Explain { container } => {
                Ok(Response::Explained(self.endpoints.explain(&container)?))
            }
            Request::Forget {
                node,
                network,
                local,
            } => {
                let forgotten = self.endpoints.forget(&node, network.as_deref(), local);
                forgotten.await.map(done_to)
            }
            Request::Export { node, network } => {
                let file = device.ok_or(Error::NoDevice)?;
                let identities = self.endpoints.identities();
                let exported = identities.export(&node, network.as_deref(), file).await;
                exported.map(done_to)
            }
            Request::Import { network, origin } => {
                let file = device.ok_or(Error::NoDevice)?;
                let imported = self.endpoints.identities().import(network, origin, file);
                imported.await.map(done_to)
            }
            Request::Logout { container } => {
                self.endpoints.logout(&container).await?;
                Ok(Response::Ok)
            }
            Request::Status => Ok(Response::Status(self.endpoints.status().await)),
        }
    }
}

fn key(engine: Engine, container_id: String, network_id: String) -> Key {
    Key {
        engine,
        id: container_id,
        network_id,
    }
}

fn done_to(kept: Kept) -> Response {
    Response::Node {
        network: kept.network,
        hostname: kept.hostname,
    }
}

fn attached(ready: &Ready) -> Response {
    Response::Attached {
        interface: ready.interface.clone(),
        dns_servers: ready.dns_servers.clone(),
        search_domains: ready.search_domains.clone(),
    }
}

/// Makes a socket that is its owner's alone; one that an earlier daemon left is replaced.
async fn listen(path: PathBuf) -> Result<(UnixListener, SocketFile), Error> {
    match UnixStream::connect(&path).await {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => {}
        Err(cause) if cause.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(&path).map_err(Error::file("remove the old socket", &path))?;
        }
        // Somebody with too many clients to take one more is there too.
        Err(cause) if cause.kind() != io::ErrorKind::WouldBlock => {
            return Err(Error::file("use the socket", &path)(cause));
        }
        _ => return Err(Error::AlreadyRunning { path }),
    }
    let listener = UnixListener::bind(&path).map_err(Error::file("make the socket", &path))?;
    let file = SocketFile(path);
    fs::set_permissions(&file.0, Permissions::from_mode(0o600))
        .map_err(Error::file("set the mode of", &file.0))?;
    Ok((listener, file))
}

/// A socket's file, removed when dropped.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// The wish that the daemon stop.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn new() -> io::Result<Self> {
        Ok(Stop {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn wanted(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Makes a directory for its owner alone, whatever its mode was.
fn private_directory(path: &Path) -> Result<(), Error> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(Error::file("make the directory", path))?;
    fs::set_permissions(path, Permissions::from_mode(0o700))
        .map_err(Error::file("set the mode of", path))
}

/// Makes a directory for its owner alone, and for this daemon alone until the value is dropped. Another
/// daemon may have it for as long as `patience`.
async fn hold(path: &Path, patience: Duration) -> Result<File, Error> {
    private_directory(path)?;
    let directory = File::open(path).map_err(Error::file("open the directory", path))?;
    let began = Instant::now();
    loop {
        match directory.try_lock() {
            Ok(()) => return Ok(directory),
            Err(TryLockError::WouldBlock) if began.elapsed() < patience => {
                // A lock tells nobody when it is free.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Err(TryLockError::WouldBlock) => {
                return Err(Error::AlreadyRunning { path: path.into() });
            }
            Err(TryLockError::Error(cause)) => {
                return Err(Error::file("lock the directory", path)(cause));
            }
        }
    }
}

/// Tells systemd how we are (sd_notify(3)), where it asked to know.
fn notify(state: &str) {
    let Some(address) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let tell = || {
        let socket = UnixDatagram::unbound()?;
        let address = match address.as_encoded_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(&address)?,
        };
        socket.send_to_addr(state.as_bytes(), &address)
    };
    if let Err(error) = tell() {
        tracing::warn!("cannot tell systemd {state}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs::File, os::fd::AsFd};

    use tailnode_node::Secret;

    use super::*;

    /// The shims' socket in a directory, and what was called on it.
    async fn with_daemon<T: Send + 'static>(
        clients: impl FnOnce(&dyn Fn(Request, Option<&File>) -> Result<Response, Error>) -> T
        + Send
        + 'static,
    ) -> (tempfile::TempDir, T) {
        let directory = tempfile::tempdir().unwrap();
        let (listener, file) = listen(directory.path().join("s.sock")).await.unwrap();
        let nodes = directory.path().join("nodes");
        let config = directory.path().join("config.toml");
        fs::write(&config, "lock = 'exit-node'").unwrap();
        let defaults = Layer::of_file(&config).unwrap();
        let secrets = Secrets::new(directory.path().join("keys"), None, "/nonexistent".into());
        let endpoints = Endpoints::new(nodes, defaults, secrets, Offload::All.into());
        let endpoints = Arc::new(endpoints.unwrap());
        let podman_db = directory.path().join("db.sql");
        let server = tokio::spawn(
            Arc::new(Shims {
                endpoints,
                podman_db,
            })
            .serve(listener),
        );
        let socket = file.0.clone();
        let result = blocking(move || {
            clients(&|request, device| {
                let device = device.map(File::as_fd);
                api::call(&socket, &request, device, Duration::from_secs(20))
            })
        })
        .await;
        server.abort();
        (directory, result)
    }

    fn options(key: &str, value: &str) -> BTreeMap<String, String> {
        [(key.to_owned(), value.to_owned())].into()
    }

    fn attach(network_options: BTreeMap<String, String>) -> Request {
        Request::Attach {
            engine: Engine::Podman,
            container_id: "ae48c7267541".into(),
            container_name: "web".into(),
            network_id: "7d2f".into(),
            network_name: "tailnet".into(),
            network_options,
            endpoint_options: BTreeMap::new(),
            annotations: BTreeMap::new(),
        }
    }

    #[tokio::test]
    async fn strangers_are_detached() {
        with_daemon(|call| {
            let detach = Request::Detach {
                engine: Engine::Podman,
                container_id: "x".into(),
                network_id: "y".into(),
            };
            assert_eq!(call(detach, None).unwrap(), Response::Ok);
            let explain = Request::Explain {
                container: "x".into(),
            };
            let error = call(explain, None).unwrap_err().to_string();
            assert!(error.contains("no container called x"), "{error}");
            assert_eq!(
                call(Request::Status, None).unwrap(),
                Response::Status(Vec::new())
            );
        })
        .await;
    }

    #[tokio::test]
    async fn a_login_is_kept_and_forgotten() {
        let login = |key: Option<&str>| Request::Login {
            network: "tailnet".into(),
            key: key.map(Secret::new),
        };
        let (directory, ()) = with_daemon(move |call| {
            assert_eq!(
                call(login(Some("tskey-auth-QQQQ")), None).unwrap(),
                Response::Ok
            );
            let bad = call(login(Some("QQQQ QQQQ")), None)
                .unwrap_err()
                .to_string();
            assert!(
                bad.contains("no auth key") && !bad.contains("QQQQ"),
                "{bad}"
            );
        })
        .await;
        let kept = fs::read_to_string(directory.path().join("keys/tailnet")).unwrap();
        assert_eq!(kept, "tskey-auth-QQQQ");
        with_daemon(move |call| {
            let none = call(login(None), None).unwrap_err().to_string();
            assert!(none.contains("no auth key is kept"), "{none}");
            call(login(Some("tskey-auth-QQQQ")), None).unwrap();
            assert_eq!(call(login(None), None).unwrap(), Response::Ok);
        })
        .await;
    }

    #[tokio::test]
    async fn a_network_is_looked_at_before_it_is_made() {
        with_daemon(|call| {
            let allows = |key: &str, value: &str| {
                let request = Request::Allows {
                    network_name: "tailnet".into(),
                    network_options: options(key, value),
                };
                call(request, None)
            };
            assert_eq!(allows("tags", "tag:web").unwrap(), Response::Ok);
            // The daemon's file, which `with_daemon` gives it, locks this.
            let error = allows("exit-node", "gw").unwrap_err().to_string();
            assert!(
                error.contains("config.toml locks it.") && error.contains("may change that"),
                "{error}"
            );
        })
        .await;
    }

    #[tokio::test]
    async fn an_attach_that_fails_leaves_nothing() {
        let (directory, ()) = with_daemon(|call| {
            let error = call(attach(BTreeMap::new()), None).unwrap_err().to_string();
            assert!(error.contains("no TUN device"), "{error}");

            let null = File::open("/dev/null").unwrap();
            let unknown = attach(options("hostnmae", "web"));
            let error = call(unknown, Some(&null)).unwrap_err().to_string();
            assert!(error.ends_with("did you mean `hostname`?"), "{error}");

            let key = options("auth-key", "file:/nonexistent/auth.key");
            let error = call(attach(key), Some(&null)).unwrap_err().to_string();
            assert!(error.contains("/nonexistent/auth.key"), "{error}");

            let nowhere = options("login-server", "http://127.0.0.1:9");
            let error = call(attach(nowhere), Some(&null)).unwrap_err().to_string();
            assert!(error.contains("TUN device"), "{error}");
            assert_eq!(
                call(Request::Status, None).unwrap(),
                Response::Status(Vec::new())
            );
        })
        .await;
        assert!(!directory.path().join("nodes/tailnet/web").exists());
    }

    #[tokio::test]
    async fn who_speaks_another_language_is_told_so() {
        let directory = tempfile::tempdir().unwrap();
        let (listener, file) = listen(directory.path().join("s.sock")).await.unwrap();
        let shims = Arc::new(Shims {
            endpoints: Arc::new(
                Endpoints::new(
                    "/nonexistent".into(),
                    Layer::default(),
                    Secrets::new("/nonexistent".into(), None, "/nonexistent".into()),
                    Offload::All.into(),
                )
                .unwrap(),
            ),
            podman_db: "/nonexistent/db.sql".into(),
        });
        let server = tokio::spawn(shims.serve(listener));
        let socket = file.0.clone();
        blocking(move || {
            // One that says nothing is in nobody's way.
            let _silent = std::os::unix::net::UnixStream::connect(&socket).unwrap();
            for words in ["{\"op\":\"dance\"}\n", "GET / HTTP/1.1\n"] {
                let mut stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
                io::Write::write_all(&mut stream, words.as_bytes()).unwrap();
                let deadline = Instant::now() + Duration::from_secs(10);
                let (answer, _) = api::receive::<Response>(&stream, deadline).unwrap();
                let Response::Error { message } = answer else {
                    panic!("{answer:?}");
                };
                assert!(message.contains("not of this version"), "{message}");
            }
        })
        .await;
        server.abort();
    }

    #[tokio::test]
    async fn a_directory_has_one_daemon() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run");
        let held = hold(&path, Duration::ZERO).await.unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let second = hold(&path, Duration::ZERO).await.unwrap_err();
        assert!(matches!(second, Error::AlreadyRunning { .. }), "{second}");
        let soon = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            drop(held);
        };
        let (third, ()) = tokio::join!(hold(&path, Duration::from_secs(20)), soon);
        third.unwrap();
    }

    #[tokio::test]
    async fn a_socket_is_roots_alone_and_replaces_only_a_dead_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s.sock");
        let (listener, file) = listen(path.clone()).await.unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let second = listen(path.clone()).await.err().unwrap();
        assert!(matches!(second, Error::AlreadyRunning { .. }), "{second}");
        drop(listener);
        // As after a crash: the file is there, and nobody behind it.
        let (_listener, again) = listen(path.clone()).await.unwrap();
        std::mem::forget(file);
        drop(again);
        assert!(!path.exists());
    }
}
