//! One node among ten thousand peers, who exist in the network map alone.
//!
//! The server is Tailscale's test control server (integration/peers/bench/crowd), for ours and for
//! theirs.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tailnode_tests::{Gopher, Host, Process, Release, Underlay, eventually};
use tempfile::TempDir;

use crate::{
    Plan,
    contender::Contender,
    machine::Machine,
    report::{CPU_PER_CHANGE, KIB_PER_PEER, MILLISECONDS, Report},
    usage,
};

const PEERS: usize = 10_000;
const KEY: &str = "tskey-auth-crowd";
const PORT: u16 = 8080;
const RELAY_PORT: u16 = 3340;
const STUN_PORT: u16 = 3478;
/// What a node takes to come to rest.
const REST: Duration = Duration::from_secs(5);
/// Changes of each kind, one every 5 ms.
const CHANGES: u32 = 1000;
const EVERY: &str = "5ms";

/// Time to ready, memory, and what a change costs.
pub fn among_many_peers(_: &Plan, contender: Contender, report: &mut Report) {
    let alone = Crowd::start(contender, 1);
    thread::sleep(REST);
    let memory_alone = alone.memory();
    let ready = alone.ready.as_secs_f64() * 1e3;
    report.add(contender, "netmap/ready/1", MILLISECONDS, ready);
    drop(alone);

    let crowd = Crowd::start(contender, PEERS);
    let ready = crowd.ready.as_secs_f64() * 1e3;
    report.add(contender, "netmap/ready/10000", MILLISECONDS, ready);
    thread::sleep(REST);
    let each = (crowd.memory() - memory_alone) / PEERS as f64 / 1024.0;
    report.add(contender, "netmap/memory", KIB_PER_PEER, each);
    for kind in ["patch", "peer"] {
        let before = usage::cpu(&crowd.daemon());
        crowd.change(kind);
        thread::sleep(Duration::from_secs(1));
        let used = (usage::cpu(&crowd.daemon()) - before) * 1e3 / f64::from(CHANGES);
        report.add(contender, &format!("netmap/{kind}"), CPU_PER_CHANGE, used);
    }
    let each = (crowd.memory() - memory_alone) / PEERS as f64 / 1024.0;
    report.add(contender, "netmap/changed/memory", KIB_PER_PEER, each);
}

struct Crowd {
    node: Machine,
    /// How long the node took from its start.
    ready: Duration,
    // They go before the directory that their logs are in.
    _server: Process,
    _relay: Process,
    _directory: TempDir,
    underlay: Underlay,
}

impl Crowd {
    fn start(contender: Contender, peers: usize) -> Crowd {
        let underlay = Underlay::new();
        let router = Underlay::ROUTER;
        let directory = TempDir::new().expect("a directory for the server");
        let mut relay = underlay.router().command(Release::Pinned.program("derper"));
        relay
            .args([format!("-a={router}:{RELAY_PORT}"), "-http-port=-1".into()])
            .arg(format!("-stun-port={STUN_PORT}"))
            .arg("-c")
            .arg(directory.path().join("derper.json"));
        let relay = Process::spawn(relay, directory.path().join("relay.log"));
        let mut server = underlay.router().command(Release::Newest.program("crowd"));
        server
            .arg(format!("-listen={router}:{PORT}"))
            .arg(format!("-relay={router}:{RELAY_PORT}"))
            .arg(format!("-stun-port={STUN_PORT}"))
            .arg(format!("-auth-key={KEY}"))
            .arg(format!("-peers={peers}"));
        let server = Process::spawn(server, directory.path().join("server.log"));
        for port in [PORT, RELAY_PORT] {
            eventually("the server answers", Duration::from_secs(30), || {
                let connect = || TcpStream::connect((router, port));
                underlay.router().run(connect).is_ok()
            });
        }
        let url = format!("http://{router}:{PORT}");
        let machine = underlay.host();
        let (node, ready) = match contender {
            Contender::Tailscaled(release) => {
                let begun = Instant::now();
                let joined = Gopher::join_as(release, machine, &url, KEY, "myself");
                let node = Machine::tailscaled(joined.unwrap());
                (node, begun.elapsed())
            }
            _ => {
                let host = Arc::new(Host::start_in(machine, &url, Some(KEY)));
                let begun = Instant::now();
                let node = Machine::ours(&host, "myself");
                (node, begun.elapsed())
            }
        };
        Crowd {
            node,
            ready,
            _server: server,
            _relay: relay,
            _directory: directory,
            underlay,
        }
    }

    fn daemon(&self) -> [u32; 1] {
        [self.node.daemon().expect("a daemon")]
    }

    fn memory(&self) -> f64 {
        usage::pss(&self.daemon())
    }

    /// Returns when all changes of this kind have been sent.
    fn change(&self, kind: &str) {
        let connect = || TcpStream::connect((Underlay::ROUTER, PORT));
        let mut stream = self.underlay.router().run(connect).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        write!(
            stream,
            "GET /changes?kind={kind}&count={CHANGES}&every={EVERY} HTTP/1.0\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.0 200"), "the server: {answer}");
    }
}
