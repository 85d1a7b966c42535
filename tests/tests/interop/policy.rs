use std::net::{IpAddr, TcpListener};

use serde_json::json;

use crate::scene::*;

pub const CASES: &[Case] = &[
    ("policy.default-deny", WITH_POLICY, default_deny),
    ("policy.one-way", WITH_POLICY, one_way),
    ("policy.port", WITH_POLICY, port),
    ("policy.icmp", WITH_POLICY, icmp),
    ("policy.tags", WITH_POLICY, tags),
    ("policy.changed", WITH_POLICY, changed),
];

fn default_deny(server: Server) {
    let scene = Scene::new(server);
    scene.set_policy(&[]);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    let ways: [(&Namespace, IpAddr); 2] =
        [(&web, gopher.addresses[0]), (&gopher, web.addresses[0])];
    for (from, to) in ways {
        assert!(!passes(from, to), "{to} was reached");
    }
    // Nothing but the policy lies between them.
    scene.set_policy(&[("*".into(), "*:*".into())]);
    for (from, to) in ways {
        within(PATIENCE, &format!("{to} is reached"), || passes(from, to));
    }
    scene.set_policy(&[]);
    for (from, to) in ways {
        within(PATIENCE, &format!("{to} is shut"), || !passes(from, to));
    }
}

fn one_way(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    let ours: (&Namespace, IpAddr) = (&web, web.addresses[0]);
    let theirs: (&Namespace, IpAddr) = (&gopher, gopher.addresses[0]);
    for ((from, source), (to, destination)) in [(theirs, ours), (ours, theirs)] {
        scene.set_policy(&[(source.to_string(), format!("{destination}:*"))]);
        within(PATIENCE, "the other way is shut", || !passes(to, source));
        within(PATIENCE, "the allowed way is open", || {
            passes(from, destination)
        });
        exchange(from, to, destination, 1_000_000);
        assert!(!passes(to, source), "{destination} reached {source}");
    }
}

fn port(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    let sides: [(&Namespace, &Namespace, IpAddr); 2] = [
        (&gopher, &web, web.addresses[0]),
        (&web, &gopher, gopher.addresses[0]),
    ];
    for (from, to, address) in sides {
        let [one, other] = [8001, 8002];
        let listen = |port| to.run(|| TcpListener::bind(("::", port))).unwrap();
        let _listening = [listen(one), listen(other)];
        scene.set_policy(&[("*".to_owned(), format!("{address}:{one}"))]);
        within(PATIENCE, "the other port is shut", || {
            !opens(from, address, other)
        });
        within(PATIENCE, "the allowed port is open", || {
            opens(from, address, one)
        });
    }
}

/// A rule for ICMP lets pings in, and nothing else. One for a port lets pings in as well: so does
/// Go's filter (wgengine/filter, matchIPsOnly), and ours.
fn icmp(server: Server) {
    const PORT: u16 = 8001;
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    let sides: [(&Namespace, &Namespace, IpAddr); 2] = [
        (&gopher, &web, web.addresses[0]),
        (&web, &gopher, gopher.addresses[0]),
    ];
    for (from, to, address) in sides {
        let _listening = to.run(|| TcpListener::bind(("::", PORT))).unwrap();
        let rule = |proto, ports| {
            let dst = [format!("{address}:{ports}")];
            let rule = json!({ "action": "accept", "src": ["*"], "proto": proto, "dst": dst });
            scene.enforce(&json!({ "acls": [rule] }));
        };
        rule("icmp", "*".to_owned());
        within(PATIENCE, "TCP is shut", || !opens(from, address, PORT));
        within(PATIENCE, "a ping passes", || passes(from, address));
        assert!(!opens(from, address, PORT), "{address} took a connection");
        rule("tcp", PORT.to_string());
        within(PATIENCE, "TCP is open", || opens(from, address, PORT));
        assert!(passes(from, address), "{address} took no ping");
        scene.set_policy(&[]);
        within(PATIENCE, "no ping passes", || !passes(from, address));
    }
}

/// `tag:web` may reach `tag:db` at one port; nobody else may, and not the other way.
fn tags(server: Server) {
    const PORT: u16 = 5432;
    const OTHER: u16 = 5433;
    for ours_is_web in [true, false] {
        let scene = Scene::new(server);
        scene.enforce(&json!({
            "tagOwners": { "tag:web": ["user@"], "tag:db": ["user@"] },
            "acls": [{
                "action": "accept", "src": ["tag:web"], "dst": [format!("tag:db:{PORT}")],
            }],
        }));
        let key = |tag| scene.key(&scene.tag_flags(tag));
        let (web, db) = ("tag:web", "tag:db");
        let [our_tag, their_tag] = if ours_is_web { [web, db] } else { [db, web] };
        let ours = scene.ours("ours", &key(our_tag), scene.host());
        let theirs = scene.gopher("theirs", &key(their_tag), scene.host());
        let stranger = scene.gopher("stranger", &scene.key(&[]), scene.host());
        let (ours, theirs): (Side, Side) =
            ((&ours, ours.addresses[0]), (&theirs, theirs.addresses[0]));
        let [web, db] = if ours_is_web {
            [ours, theirs]
        } else {
            [theirs, ours]
        };
        let listen = |at: &Namespace, port| at.run(|| TcpListener::bind(("::", port))).unwrap();
        let _listening = [listen(db.0, PORT), listen(db.0, OTHER), listen(web.0, PORT)];
        within(PATIENCE, "web reaches db", || opens(web.0, db.1, PORT));
        assert!(!opens(web.0, db.1, OTHER), "web reached another port");
        assert!(!opens(db.0, web.1, PORT), "db reached web");
        assert!(!opens(&stranger, db.1, PORT), "a stranger reached db");
    }
}

/// A rule that is taken away ends what runs by it, and a rule that stays lets it run on.
fn changed(server: Server) {
    const KEPT: u16 = 8000;
    const GONE: u16 = 8001;
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    let ways: [(&Namespace, &Namespace, IpAddr); 2] = [
        (&gopher, &web, web.addresses[0]),
        (&web, &gopher, gopher.addresses[0]),
    ];
    for (from, to, address) in ways {
        let rule = |port| ("*".to_owned(), format!("{address}:{port}"));
        scene.set_policy(&[rule(KEPT), rule(GONE)]);
        within(PATIENCE, "the way is open", || passes(from, address));
        let kept = flow(from, to, address, KEPT);
        let gone = flow(from, to, address, GONE);
        scene.set_policy(&[rule(KEPT)]);
        if address == web.addresses[0] {
            stops(&gone, 5);
        } else {
            // Go's filter asks no rule for TCP packets without SYN. New connections it refuses.
            let _listening = to.run(|| TcpListener::bind(("::", GONE)));
            within(5, "the port is shut", || !opens(from, address, GONE));
        }
        flows(&kept, 5);
        scene.set_policy(&[]);
        stops(&kept, 5);
        stops(&gone, 5);
    }
}

type Side<'a> = (&'a Namespace, IpAddr);
