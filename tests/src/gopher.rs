use std::{
    fs,
    net::{IpAddr, SocketAddr},
    ops::Deref,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    NameServer, Namespace, eventually,
    program::{Process, Release, ask},
};

/// A machine with Tailscale's own client, which is written in Go.
pub struct Gopher {
    // The first to go: its log is in the directory.
    daemon: Process,
    release: Release,
    namespace: Namespace,
    /// Its addresses in the tailnet, IPv4 first.
    pub addresses: Vec<IpAddr>,
    directory: TempDir,
}

impl Gopher {
    /// A machine that has joined by this key, or why it was not let in.
    pub fn join(
        namespace: Namespace,
        login_server: &str,
        key: &str,
        name: &str,
    ) -> Result<Gopher, String> {
        Gopher::join_with(namespace, login_server, key, name, &[])
    }

    /// The same with variables in its environment.
    pub fn join_with(
        namespace: Namespace,
        login_server: &str,
        key: &str,
        name: &str,
        environment: &[(&str, &str)],
    ) -> Result<Gopher, String> {
        let mut gopher = Gopher::start(Release::Pinned, namespace, login_server, environment);
        gopher.up_by(login_server, key, name)?;
        Ok(gopher)
    }

    /// The same with the client of a release.
    pub fn join_as(
        release: Release,
        namespace: Namespace,
        login_server: &str,
        key: &str,
        name: &str,
    ) -> Result<Gopher, String> {
        let mut gopher = Gopher::start(release, namespace, login_server, &[]);
        gopher.up_by(login_server, key, name)?;
        Ok(gopher)
    }

    /// Ends its daemon, as an engine does.
    pub fn stop(&mut self) {
        self.daemon.terminate();
    }

    /// The same machine started again: its daemon has the state and the address of before.
    pub fn started_again(
        self,
        login_server: &str,
        key: &str,
        name: &str,
    ) -> Result<Gopher, String> {
        let Gopher {
            release,
            namespace,
            directory,
            ..
        } = self;
        let mut gopher = Gopher::run(release, namespace, directory, login_server, &[]);
        gopher.up_by(login_server, key, name)?;
        Ok(gopher)
    }

    fn up_by(&mut self, login_server: &str, key: &str, name: &str) -> Result<(), String> {
        let key = format!("--auth-key={key}");
        self.up(login_server, name, &[&key])?;
        self.learn_addresses()
    }

    /// The same without a key: somebody, `open`, is given the URL of the login page.
    pub fn log_in(
        namespace: Namespace,
        login_server: &str,
        name: &str,
        open: impl FnOnce(&str),
    ) -> Result<Gopher, String> {
        let mut gopher = Gopher::start(Release::Pinned, namespace, login_server, &[]);
        thread::scope(|scope| {
            let up = scope.spawn(|| gopher.up(login_server, name, &[]));
            let mut page = String::new();
            eventually("there is a login page", Duration::from_secs(10), || {
                let status = gopher.status().unwrap_or_default();
                page = status["AuthURL"].as_str().unwrap_or_default().to_owned();
                !page.is_empty()
            });
            open(&page);
            up.join().expect("tailscale up")
        })?;
        gopher.learn_addresses()?;
        Ok(gopher)
    }

    /// Joins again after its key has expired or it has logged out.
    pub fn join_again(&self, login_server: &str, key: &str, name: &str) {
        let key = format!("--auth-key={key}");
        self.up(login_server, name, &["--force-reauth", &key])
            .unwrap_or_else(|error| panic!("tailscale up: {error}"));
    }

    /// `tailscale logout`.
    pub fn log_out(&self) {
        self.tailscale(&["logout"])
            .unwrap_or_else(|error| panic!("tailscale logout: {error}"));
    }

    /// Locks the tailnet: from now on this client says who is in it, beginning with all who are.
    pub fn lock(&self) {
        let status = self.ask_of_lock(&["status", "--json"]);
        let status: Value = serde_json::from_str(&status).expect("lock's status as JSON");
        let key = status["PublicKey"].as_str().expect("the client's own key");
        self.ask_of_lock(&["init", "--gen-disablements=1", "--confirm", key]);
    }

    /// Lets a node into a locked tailnet.
    pub fn sign(&self, node_key: &str) {
        self.ask_of_lock(&["sign", node_key]);
    }

    /// Its own key, by which peers know it.
    pub fn node_key(&self) -> String {
        let status = self.status().unwrap_or_default();
        status["Self"]["PublicKey"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    fn ask_of_lock(&self, words: &[&str]) -> String {
        self.tailscale(&[&["lock"], words].concat())
            .unwrap_or_else(|error| panic!("tailscale lock {words:?}: {error}"))
    }

    fn start(
        release: Release,
        namespace: Namespace,
        login_server: &str,
        environment: &[(&str, &str)],
    ) -> Gopher {
        let directory = TempDir::new().expect("a directory for tailscaled");
        fill_etc(&directory);
        Gopher::run(release, namespace, directory, login_server, environment)
    }

    fn run(
        release: Release,
        namespace: Namespace,
        directory: TempDir,
        login_server: &str,
        environment: &[(&str, &str)],
    ) -> Gopher {
        let mut daemon = command(release, &namespace, &directory);
        daemon.envs(environment.iter().copied());
        if login_server.starts_with("http:") {
            daemon.env("TS_DEBUG_USE_DERP_HTTP", "1");
        }
        let gopher = Gopher {
            daemon: Process::spawn(daemon, directory.path().join("test.log")),
            release,
            namespace,
            addresses: Vec::new(),
            directory,
        };
        // It takes questions from then on, and answers when it can.
        eventually("tailscaled listens", Duration::from_secs(10), || {
            UnixStream::connect(gopher.socket()).is_ok()
        });
        gopher
    }

    fn up(&self, login_server: &str, name: &str, words: &[&str]) -> Result<String, String> {
        let login_server = format!("--login-server={login_server}");
        let hostname = format!("--hostname={name}");
        self.tailscale(&[&["up", "--timeout=30s", &login_server, &hostname], words].concat())
    }

    fn learn_addresses(&mut self) -> Result<(), String> {
        let text = self.tailscale(&["ip"])?;
        let addresses = text.lines().map(|line| line.parse().expect("an address"));
        self.addresses = addresses.collect();
        Ok(())
    }

    /// Whether `tailscale ping` gets an answer by a direct path in `count` attempts.
    pub fn pings_directly(&self, to: IpAddr, count: u32) -> Result<String, String> {
        self.tailscale(&[
            "ping",
            "--until-direct",
            "--timeout=2s",
            &format!("--c={count}"),
            &to.to_string(),
        ])
    }

    /// What `tailscale ping` says of one attempt: `pong from NAME (IP) via WAY in TIME`.
    pub fn ping_once(&self, to: IpAddr) -> Result<String, String> {
        self.tailscale(&[
            "ping",
            "--until-direct=false",
            "--timeout=5s",
            "--c=1",
            &to.to_string(),
        ])
    }

    /// The daemon's process id.
    pub fn daemon_id(&self) -> u32 {
        self.daemon.id()
    }

    /// Changes its preferences: flags as for `tailscale set`.
    pub fn set(&self, flags: &[&str]) {
        self.tailscale(&[&["set"], flags].concat())
            .unwrap_or_else(|error| panic!("tailscale set {flags:?}: {error}"));
    }

    /// What it knows of the peer of this name, as `tailscale status --json` tells it.
    pub fn peer(&self, name: &str) -> Option<Value> {
        let status = self.status()?;
        let peers = status["Peer"].as_object()?;
        peers
            .values()
            .find(|peer| {
                let full = peer["DNSName"].as_str().unwrap_or_default();
                full.split('.').next() == Some(name)
            })
            .cloned()
    }

    /// Code of the region where it is at home; empty: nowhere.
    pub fn home_relay(&self) -> String {
        let status = self.status().unwrap_or_default();
        let code = status["Self"]["Relay"].as_str();
        code.unwrap_or_default().to_owned()
    }

    /// What `tailscale status` shows to a person.
    pub fn status_text(&self) -> String {
        self.tailscale(&["status"]).unwrap_or_default()
    }

    /// What `tailscale netcheck` finds out about the network, as JSON.
    pub fn netcheck(&self) -> Value {
        let text = self
            .tailscale(&["netcheck", "--format=json"])
            .expect("tailscale netcheck");
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// What `tailscale debug derp` says of a region.
    pub fn debug_derp(&self, region: &str) -> String {
        self.tailscale(&["debug", "derp", region])
            .expect("tailscale debug derp")
    }

    /// Where it may reach a peer by UDP, in the words of the control server.
    pub fn endpoints_of(&self, name: &str) -> Vec<SocketAddr> {
        let text = self.tailscale(&["debug", "netmap"]).unwrap_or_default();
        let netmap: Value = serde_json::from_str(&text).unwrap_or_default();
        let peers = netmap["Peers"].as_array().into_iter().flatten();
        let endpoints = peers
            .filter(|peer| {
                let full = peer["Name"].as_str().unwrap_or_default();
                full.split('.').next() == Some(name)
            })
            .filter_map(|peer| peer["Endpoints"].as_array())
            .flatten();
        endpoints
            .map(|endpoint| {
                let text = endpoint.as_str().unwrap_or_default();
                text.parse().expect("an address and a port")
            })
            .collect()
    }

    fn status(&self) -> Option<Value> {
        let text = self.tailscale(&["status", "--json"]).ok()?;
        serde_json::from_str(&text).ok()
    }

    fn tailscale(&self, words: &[&str]) -> Result<String, String> {
        let program = self.release.program("tailscale");
        let mut command = self.namespace.command(program);
        command.arg("--socket").arg(self.socket()).args(words);
        ask(command)
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("tailscaled.sock")
    }
}

/// What a namespace's programs can do, those beside the client can.
impl Deref for Gopher {
    type Target = Namespace;

    fn deref(&self) -> &Namespace {
        &self.namespace
    }
}

/// It rewrites /etc/resolv.conf, and so has an /etc of its own.
fn fill_etc(directory: &TempDir) {
    let etc = directory.path().join("etc");
    fs::create_dir(&etc).expect("make its /etc");
    for file in ["passwd", "group", "nsswitch.conf"] {
        fs::copy(Path::new("/etc").join(file), etc.join(file)).expect("fill its /etc");
    }
    fs::write(etc.join("resolv.conf"), NameServer::RESOLV_CONF).expect("write its resolv.conf");
}

fn command(release: Release, namespace: &Namespace, directory: &TempDir) -> Command {
    let path = directory.path();
    let mut command = namespace.command("unshare");
    command
        .args(["--mount", "sh", "-ec"])
        .arg("mount --bind \"$1\" /etc; shift; exec \"$@\"")
        .arg("sh")
        .arg(path.join("etc"))
        .arg(release.program("tailscaled"))
        .args(["--tun=ts0", "--port=0", "--no-logs-no-support"])
        .arg("--statedir")
        .arg(path.join("state"))
        .arg("--socket")
        .arg(path.join("tailscaled.sock"))
        .env("TS_LOGS_DIR", path);
    command
}
