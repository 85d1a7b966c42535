// testcontrol serves the control server of Tailscale's own tests. Everything is in memory, and
// everyone may reach everyone.
package main

import (
	"encoding/json"
	"flag"
	"log"
	"net/http"
	"os"
	"strings"

	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/dnstype"
)

func main() {
	listen := flag.String("listen", "", "IP:PORT of the control server")
	tlsCert := flag.String("tls-cert", "", "serve HTTPS with the certificate in this file")
	tlsKey := flag.String("tls-key", "", "the file with its key")
	derpMap := flag.String("derp-map", "", "file with the relays that are told to nodes, as JSON")
	domain := flag.String("domain", "", "suffix of all names")
	authKey := flag.String("auth-key", "", "what nodes must know to join")
	byLogin := flag.Bool("by-login", false, "nodes join when somebody opens their login page")
	record := flag.String("record", "", "NAME=IP that is no node's")
	splitDNS := flag.String("split-dns", "", "ZONE=IP of the DNS server to ask for its names")
	flag.Parse()
	name, address, _ := strings.Cut(*record, "=")
	zone, resolver, _ := strings.Cut(*splitDNS, "=")

	text, err := os.ReadFile(*derpMap)
	if err != nil {
		log.Fatal(err)
	}
	var relays tailcfg.DERPMap
	if err := json.Unmarshal(text, &relays); err != nil {
		log.Fatalf("%s: %v", *derpMap, err)
	}
	scheme := "http://"
	if *tlsCert != "" {
		scheme = "https://"
	}
	control := &testcontrol.Server{
		ExplicitBaseURL:  scheme + *listen,
		RequireAuthKey:   *authKey,
		RequireAuth:      *byLogin,
		MagicDNSDomain:   *domain,
		AllNodesSameUser: true,
		AllOnline:        true,
		DefaultNodeCapabilities: &tailcfg.NodeCapMap{
			tailcfg.CapabilityTailnetLock: nil,
		},
		DNSConfig: &tailcfg.DNSConfig{
			Proxied:      true,
			Domains:      []string{*domain},
			Routes:       map[string][]*dnstype.Resolver{*domain: nil, zone: {{Addr: resolver}}},
			ExtraRecords: []tailcfg.DNSRecord{{Name: name, Value: address}},
		},
		DERPMap: &relays,
	}
	server := administered(control)
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case !strings.HasPrefix(r.URL.Path, "/auth/"):
			server.ServeHTTP(w, r)
		case !control.CompleteAuth(r.URL.Path):
			http.NotFound(w, r)
		}
	})
	if *tlsCert != "" {
		log.Fatal(http.ListenAndServeTLS(*listen, *tlsCert, *tlsKey, handler))
	}
	log.Fatal(http.ListenAndServe(*listen, handler))
}
