use std::{
    fs,
    io::Write,
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    Container, NameServer, Namespace, Tailnet, Underlay, WallClock, eventually,
    program::{Process, ask, is_empty, program, tell},
};

/// A machine that runs containers: a namespace with the daemon in it.
pub struct Host {
    // The first to go: its log is in the directory.
    daemon: Process,
    /// Its place on the underlay.
    pub namespace: Namespace,
    /// What its daemon takes for the time of day, where that is not the host's.
    clock: Option<WallClock>,
    arguments: Vec<&'static str>,
    directory: TempDir,
}

impl Host {
    /// A new machine on the underlay, whose containers join this tailnet by this key unless their
    /// network says otherwise. It returns when the daemon answers.
    pub fn start(underlay: &Underlay, tailnet: &Tailnet, key: &str) -> Host {
        Host::start_at(underlay, &tailnet.url(), key)
    }

    /// The same, with any URL for the coordination server's.
    pub fn start_at(underlay: &Underlay, login_server: &str, key: &str) -> Host {
        Host::start_in(underlay.host(), login_server, Some(key))
    }

    /// The same, with further arguments for the daemon.
    pub fn start_with(
        underlay: &Underlay,
        tailnet: &Tailnet,
        key: &str,
        arguments: &[&'static str],
    ) -> Host {
        Host::begin(None, underlay.host(), &tailnet.url(), Some(key), arguments)
    }

    /// The same, with a daemon that logs all that it can.
    pub fn start_loud(underlay: &Underlay, tailnet: &Tailnet, key: &str) -> Host {
        let mut namespace = underlay.host();
        namespace.logs_everything();
        Host::start_in(namespace, &tailnet.url(), Some(key))
    }

    /// The same, with any machine; without a key, somebody must open the login page of each node.
    pub fn start_in(namespace: Namespace, login_server: &str, key: Option<&str>) -> Host {
        Host::begin(None, namespace, login_server, key, &[])
    }

    /// The same, with a daemon that goes by this clock.
    pub fn start_by(
        clock: WallClock,
        namespace: Namespace,
        login_server: &str,
        key: Option<&str>,
    ) -> Host {
        Host::begin(Some(clock), namespace, login_server, key, &[])
    }

    fn begin(
        clock: Option<WallClock>,
        namespace: Namespace,
        login_server: &str,
        key: Option<&str>,
        arguments: &[&'static str],
    ) -> Host {
        let directory = TempDir::new().expect("a directory for the daemon");
        let config = directory.path().join("config.toml");
        let auth_key = key.map_or_else(String::new, |key| {
            let file = key_file(directory.path(), "auth.key", key);
            format!("auth-key = \"{file}\"\n")
        });
        let text = format!("login-server = \"{login_server}\"\n{auth_key}");
        fs::write(&config, text).expect("write the daemon's configuration");
        let daemon = spawn(&namespace, clock.as_ref(), directory.path(), arguments);
        let host = Host {
            arguments: arguments.to_vec(),
            namespace,
            clock,
            directory,
            daemon,
        };
        host.wait_until_it_answers();
        host
    }

    /// Writes a further auth key and returns the `auth-key` option that names it.
    pub fn auth_key(&self, name: &str, key: &str) -> String {
        key_file(self.directory.path(), name, key)
    }

    /// What Podman does when a container starts: runs the plugin. Returns what it said, or its
    /// error.
    pub fn attach(&self, container: &Container) -> Result<Value, String> {
        self.attach_to(container, "tailnet", json!({}))
    }

    /// The same, on a network of another name and with options (`-o`).
    pub fn attach_to(
        &self,
        container: &Container,
        network: &str,
        options: Value,
    ) -> Result<Value, String> {
        self.plugin("setup", container, network, options)
    }

    /// What Podman does when a container stops.
    pub fn detach(&self, container: &Container) -> Result<Value, String> {
        self.plugin("teardown", container, "tailnet", json!({}))
    }

    /// `podman network create`.
    pub fn create_network(&self, network: Value) -> Result<Value, String> {
        self.run_plugin(&["create"], &network)
    }

    fn plugin(
        &self,
        command: &str,
        container: &Container,
        network: &str,
        options: Value,
    ) -> Result<Value, String> {
        let path = container.namespace.path();
        let request = json!({
            "container_id": container.id, "container_name": container.name,
            "port_mappings": null,
            "network": {
                "dns_enabled": false, "driver": "tailscale", "id": format!("id-of-{network}"),
                "internal": false, "ipv6_enabled": false, "name": network,
                "network_interface": null, "options": options,
                "ipam_options": { "driver": "none" }, "subnets": null, "routes": null,
                "network_dns_servers": null,
            },
            "network_options": {
                "aliases": [container.id], "interface_name": "eth0", "static_ips": null,
                "static_mac": null, "options": {},
            },
        });
        self.run_plugin(&[command, &path.to_string_lossy()], &request)
    }

    fn run_plugin(&self, arguments: &[&str], request: &Value) -> Result<Value, String> {
        let mut plugin = self
            .namespace
            .command(program("tailscale"))
            .args(arguments)
            .env("TAILNODE_SOCKET", self.socket())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("run the plugin");
        let mut stdin = plugin.stdin.take().expect("the plugin's standard input");
        stdin
            .write_all(request.to_string().as_bytes())
            .expect("write the plugin's request");
        drop(stdin);
        let output = plugin.wait_with_output().expect("the plugin's output");
        let text = String::from_utf8_lossy(&output.stdout);
        let answer: Value = match text.trim() {
            "" => Value::Null,
            text => serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}")),
        };
        if output.status.success() {
            Ok(answer)
        } else {
            Err(answer["error"]
                .as_str()
                .expect("an error on standard output")
                .to_owned())
        }
    }

    /// The containers, as `tailnode status --json` tells them.
    pub fn status(&self) -> Vec<Value> {
        let output = self.tailnode(&["status", "--json"]);
        let output = output.unwrap_or_else(|error| panic!("tailnode status: {error}"));
        serde_json::from_str(&output).expect("the status as JSON")
    }

    /// What `tailnode` says to these words, or its error.
    pub fn tailnode(&self, words: &[&str]) -> Result<String, String> {
        let mut command = Command::new(program("tailnode"));
        command.args(words).env("TAILNODE_SOCKET", self.socket());
        ask(command)
    }

    /// What `tailnode` says to these words with this on its standard input, or its error.
    pub fn tailnode_with(&self, words: &[&str], input: &str) -> Result<String, String> {
        let mut command = Command::new(program("tailnode"));
        command.args(words).env("TAILNODE_SOCKET", self.socket());
        tell(command, input)
    }

    /// Where all files of its daemon are.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// What `tailnode status` shows to a person.
    pub fn status_text(&self) -> String {
        let mut command = Command::new(program("tailnode"));
        command.arg("status").env("TAILNODE_SOCKET", self.socket());
        ask(command).expect("tailnode status")
    }

    /// What the daemon says of one container.
    pub fn status_of(&self, container: &Container) -> Option<Value> {
        self.status()
            .into_iter()
            .find(|status| status["container_id"] == *container.id)
    }

    /// Ends the daemon as systemd does, and checks that it took its sockets away.
    pub fn stop(&mut self) {
        self.daemon.terminate();
        assert!(
            !self.socket().exists(),
            "the daemon left {}",
            self.socket().display()
        );
        assert!(
            is_empty(&self.directory.path().join("plugins")),
            "Docker's socket was left"
        );
    }

    /// Ends the daemon as a crash does.
    pub fn kill(&mut self) {
        self.daemon.kill();
    }

    /// Starts the daemon again, with its state of before.
    pub fn restart(&mut self) {
        self.daemon = spawn(
            &self.namespace,
            self.clock.as_ref(),
            self.directory.path(),
            &self.arguments,
        );
        self.wait_until_it_answers();
    }

    /// Stops the daemon in its tracks, so that it takes requests and never answers.
    pub fn freeze(&mut self) {
        self.daemon.signal(Signal::SIGSTOP);
    }

    /// Sets its clock so many seconds ahead, or behind.
    pub fn set_clock(&self, seconds: i64) {
        let clock = self.clock.as_ref().expect("a host with a clock of its own");
        clock.set(seconds);
    }

    /// The daemon's process id.
    pub fn daemon_id(&self) -> u32 {
        self.daemon.id()
    }

    /// How many descriptors the daemon has open.
    pub fn open_files(&self) -> usize {
        let path = format!("/proc/{}/fd", self.daemon.id());
        fs::read_dir(path).map_or(0, Iterator::count)
    }

    /// What the daemon logged.
    pub fn log(&self) -> String {
        self.daemon.log()
    }

    /// Where the daemon keeps the node of this hostname on the network `tailnet`.
    pub fn state_of(&self, hostname: &str) -> PathBuf {
        let nodes = self.directory.path().join("state/nodes");
        nodes.join("tailnet").join(hostname)
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("run/tailnoded.sock")
    }

    fn wait_until_it_answers(&self) {
        eventually("the daemon answers", Duration::from_secs(10), || {
            UnixStream::connect(self.socket()).is_ok()
        });
    }
}

fn spawn(
    namespace: &Namespace,
    clock: Option<&WallClock>,
    directory: &Path,
    arguments: &[&str],
) -> Process {
    // It asks the underlay's name server, and never those of the machine that runs the tests.
    let resolv_conf = directory.join("resolv.conf");
    fs::write(&resolv_conf, NameServer::RESOLV_CONF).expect("write its resolv.conf");
    let mut command = namespace.command("unshare");
    command
        .args(["--mount", "sh", "-ec"])
        .arg("mount --bind \"$1\" /etc/resolv.conf; shift; exec \"$@\"")
        .arg("sh")
        .arg(resolv_conf)
        .arg(program("tailnoded"))
        .args(arguments);
    if let Some(clock) = clock {
        clock.rule(&mut command);
    }
    for (flag, path) in [
        ("--config", "config.toml"),
        ("--state", "state"),
        ("--run-dir", "run"),
        ("--docker-plugin-dir", "plugins"),
        ("--docker-socket", "no-docker.sock"),
        ("--podman-db", "no-podman.sql"),
    ] {
        command.arg(flag).arg(directory.join(path));
    }
    Process::spawn(command, directory.join("test.log"))
}

fn key_file(directory: &Path, name: &str, key: &str) -> String {
    let path = directory.join(name);
    fs::write(&path, key).expect("write the auth key");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("protect the auth key");
    format!("file:{}", path.display())
}
