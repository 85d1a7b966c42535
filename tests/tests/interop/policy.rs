use std::net::IpAddr;
use std::net::TcpListener;

use crate::scene::*;

pub const CASES: &[Case] = &[
    ("policy.default-deny", WITH_POLICY, default_deny),
    ("policy.one-way", WITH_POLICY, one_way),
    ("policy.port", WITH_POLICY, port),
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
        within(5, &format!("{to} is reached"), || passes(from, to));
    }
    scene.set_policy(&[]);
    for (from, to) in ways {
        within(5, &format!("{to} is shut"), || !passes(from, to));
    }
}

fn one_way(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    let ours: (&Namespace, IpAddr) = (&web, web.addresses[0]);
    let theirs: (&Namespace, IpAddr) = (&gopher, gopher.addresses[0]);
    for ((from, source), (to, destination)) in [(theirs, ours), (ours, theirs)] {
        scene.set_policy(&[(source.to_string(), format!("{destination}:*"))]);
        within(5, "the other way is shut", || !passes(to, source));
        within(5, "the allowed way is open", || passes(from, destination));
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
        within(5, "the other port is shut", || !opens(from, address, other));
        within(5, "the allowed port is open", || opens(from, address, one));
    }
}
