use std::{fs, net::IpAddr, ops::Deref, path::Path, process::Command, thread, time::Duration};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    NameServer, Namespace, eventually,
    program::{Process, ask, peer},
};

/// A machine with Tailscale's own client, which is written in Go.
pub struct Gopher {
    // The first to go: its log is in the directory.
    _daemon: Process,
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
        let mut gopher = Gopher::start(namespace, environment);
        let key = format!("--auth-key={key}");
        gopher.up(login_server, name, &[&key])?;
        gopher.learn_addresses()?;
        Ok(gopher)
    }

    /// The same without a key: somebody, `open`, is given the URL of the login page.
    pub fn log_in(
        namespace: Namespace,
        login_server: &str,
        name: &str,
        open: impl FnOnce(&str),
    ) -> Result<Gopher, String> {
        let mut gopher = Gopher::start(namespace, &[]);
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

    fn start(namespace: Namespace, environment: &[(&str, &str)]) -> Gopher {
        let directory = TempDir::new().expect("a directory for tailscaled");
        let gopher = Gopher {
            _daemon: spawn(&namespace, &directory, environment),
            namespace,
            addresses: Vec::new(),
            directory,
        };
        eventually("tailscaled answers", Duration::from_secs(10), || {
            gopher.status().is_some()
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

    fn status(&self) -> Option<Value> {
        let text = self.tailscale(&["status", "--json"]).ok()?;
        serde_json::from_str(&text).ok()
    }

    fn tailscale(&self, words: &[&str]) -> Result<String, String> {
        let mut command = Command::new(peer("tailscale"));
        let socket = self.directory.path().join("tailscaled.sock");
        command.arg("--socket").arg(socket).args(words);
        ask(command)
    }
}

/// What a namespace's programs can do, those beside the client can.
impl Deref for Gopher {
    type Target = Namespace;

    fn deref(&self) -> &Namespace {
        &self.namespace
    }
}

fn spawn(namespace: &Namespace, directory: &TempDir, environment: &[(&str, &str)]) -> Process {
    let path = directory.path();
    // It rewrites /etc/resolv.conf, and so has an /etc of its own.
    let etc = path.join("etc");
    fs::create_dir(&etc).expect("make its /etc");
    for file in ["passwd", "group", "nsswitch.conf"] {
        fs::copy(Path::new("/etc").join(file), etc.join(file)).expect("fill its /etc");
    }
    fs::write(etc.join("resolv.conf"), NameServer::RESOLV_CONF).expect("write its resolv.conf");
    let mut command = namespace.command("unshare");
    command
        .args(["--mount", "sh", "-ec"])
        .arg("mount --bind \"$1\" /etc; shift; exec \"$@\"")
        .arg("sh")
        .arg(&etc)
        .arg(peer("tailscaled"))
        .args(["--tun=ts0", "--port=0", "--no-logs-no-support"])
        .arg("--statedir")
        .arg(path.join("state"))
        .arg("--socket")
        .arg(path.join("tailscaled.sock"))
        .envs(environment.iter().copied())
        .env("TS_LOGS_DIR", path)
        // The relays of these tailnets speak plain HTTP.
        .env("TS_DEBUG_USE_DERP_HTTP", "1");
    Process::spawn(command, path.join("test.log"))
}
